"""llama.cpp, run: every run in a process of its own, by `llama-bench` or by the wheel `xllamacpp`.

Imports what stands below it. A *run* is one process with one file; a *round* is a run of each way;
a *way* is a file with or without GGML_CUDA_GRAPH_OPT; a *row* compares two ways in one test.
`worker` is what runs in the process with the wheel.
"""
