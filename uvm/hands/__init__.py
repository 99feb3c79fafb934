"""Hands: generated code runs in these locked-down child processes, never in the kernel's. Layer 2.

`pool` is the kernel's side, `worker` the child's; `calls` and `natives` are what both sides' users speak.
The package itself imports nothing: the children pass through it, and must not load what the kernel needs.
"""
