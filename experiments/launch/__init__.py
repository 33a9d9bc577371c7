"""From a command line to a run and back: flags, configs, results, exit codes, publication."""
