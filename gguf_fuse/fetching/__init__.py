"""Files that lie elsewhere, by address: which version is there, and ranges of its bytes.

Knows nothing of GGUF. Nothing of it is imported for files on this machine's disks.
"""
