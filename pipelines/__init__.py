"""One file, one command. A pipeline never imports a pipeline."""
