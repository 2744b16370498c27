"""The command line: thin verbs over documented functions (see `hrvlm_jax.cli.main`)."""
