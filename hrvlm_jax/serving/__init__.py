"""One loaded model, many questions: continuous batching, and the server in front of it."""
