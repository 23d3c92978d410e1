"""What the gates cost, measured: ``python -m benchmarks.cpu --help``. Not part of the installed package."""
