"""Functions for users of other libraries: one module for each, which imports the library when it is used."""
