"""Plan -> new files: every byte gets its place, a set is cut into shards, ranges are copied, and
what is whole is published under its name.

May import planning and format. Words: a *placement* is a whole new file, byte for byte; a *copy* is
a range that goes into it; *cloned* bytes are shared with the source instead of copied.
"""
