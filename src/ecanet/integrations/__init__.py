"""Functions for users of other libraries, one a module, which imports its library when a function is called."""
