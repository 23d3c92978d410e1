"""Operations on feature maps and channel means: no parameters, no modules.

:mod:`ecanet.ops.reference` holds them in plain PyTorch; every faster kernel is compared with it.
"""
