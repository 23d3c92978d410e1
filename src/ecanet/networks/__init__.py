"""Questions about any network: whether it can be changed, which shapes run through it, what it costs.

Nothing here changes a network; :mod:`ecanet.surgery` does.
"""
