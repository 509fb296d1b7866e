"""One file for each shard format; `..format_registry` lists them."""
