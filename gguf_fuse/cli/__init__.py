"""The command line: one module per command, which parses, calls one function, and prints.

Nothing else prints. It may import every other folder, and nothing imports it. What costs time to
load (numpy, the progress bar, what reads and writes files) is imported where it is used, or is
named as `gguf_fuse.fuse`, which loads it when it is called: `--help` needs none of it.
"""

from gguf_fuse.cli.start import main

__all__ = ["main"]
