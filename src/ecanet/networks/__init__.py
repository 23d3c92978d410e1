"""What can be asked of any network: may it be changed, what shapes run through it, what does it cost.

Nothing here changes a network; :mod:`ecanet.surgery` does.
"""
