"""The end of a residual branch: norm, gate, addition of the residual, activation.

``functional.py`` has what users call. A call makes one plan (``plan.py``: who computes, and with what) and follows it:
the modules themselves, the kernels (``eager.py``), or what a compiler's graph gets (``compiled.py``).

    maths.py               what the tail knows of a norm and of a gate
    reading.py             how it is read off modules, or why a module has to be called
    gradients_of_gates.py  the small graph of a gate that is no band of ECA, and a gate for second derivatives
    statistics.py          running statistics; statistics that several processes share
    shared_norm.py         a norm that is called and shares its statistics on a CPU
    pointwise.py           the squeeze of a 1 x 1 convolution's output, from its input
"""
