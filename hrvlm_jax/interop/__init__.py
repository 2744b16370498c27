"""Everything that exchanges weights: convert, export, starts, adapters, hub, card, certificate."""
