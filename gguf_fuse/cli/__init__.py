"""The command line: one module per command, which parses, calls one function, and prints.

Nothing else prints. It may import every other folder, and nothing imports it. What costs time to
load (api and all below it, numpy, the progress bar) is imported where it is used: `--help` needs
none of it, and all its modules are loaded for `--help`, except `layers`.
"""

from gguf_fuse.cli.entry import app, main

__all__ = ["app", "main"]
