"""The benchmark: this plugin beside its peers. See `python tests/benchmark --help`."""
