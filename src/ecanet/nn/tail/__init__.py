"""The end of a residual branch: norm, gate, addition of the residual, activation.

Users call the functions of ``functional.py``. A call makes one plan (``plan.py``): it says what computes the tail, and
from what. That is the modules themselves, the kernels (``eager.py``), or a compiler's graph (``compiled.py``).

    maths.py               what norm and gate compute: tensors, numbers and a function
    reading.py             reads that off the modules, or says why a module has to be called
    gradients_of_gates.py  autograd's graph of a gate other than ECA's band
    second_derivatives.py  the backward in operations that can be differentiated again
    statistics.py          running statistics; statistics that several processes share
    shared_norm.py         a SyncBatchNorm that is called on a CPU
    pointwise.py           computes the means of a 1 x 1 convolution's output from its input
"""
