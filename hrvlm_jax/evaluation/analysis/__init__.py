"""The analyses of the papers, as functions over scores, probabilities and features."""
