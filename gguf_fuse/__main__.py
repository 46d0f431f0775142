from gguf_fuse.cli import main

main()
