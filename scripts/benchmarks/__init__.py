"""The benchmarks of `scripts/benchmark.py`, one module for each subject.

A benchmark is a function that takes the command's options and gives tables; ``@benchmark("name")`` above it is all that
it takes to be run, reported, compared and tested with the others. See `benchmarks.harness`.
"""
