"""Many files: what is to be done, who does it, and the ledger that remembers it.

Imports what stands below: api, which does one file. Prints nothing; `cli/batch.py` does.
"""
