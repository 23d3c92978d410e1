"""Operations on feature maps and channel means: no parameters, no modules.

Each is ``torch.ops.ecanet.NAME`` and has a plain-PyTorch twin of the same name and arguments in
:mod:`ecanet.ops.reference`, which runs where there is no kernel. Importing this package registers the operations and
loads the C++ library if it is built.
"""

from ecanet.ops import backend as _backend  # noqa: F401
from ecanet.ops import library as _library  # noqa: F401
