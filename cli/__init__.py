"""The `sentinel-node` commands: they parse, call one thing and print.

What computes or talks to the network is imported when a command runs, not when its module is: importing torch and
hivemind takes seconds, and `--help` or a mistyped flag should be answered at once.
"""
