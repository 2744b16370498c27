"""What `hrvlm bench` runs with: cases, the two sides as processes, measuring, results, tables."""
