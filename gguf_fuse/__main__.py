from gguf_fuse.cli.start import main

main()
