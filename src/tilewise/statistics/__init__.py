"""What attention looked at, without a matrix of it: column sums, entropy, top keys, largest scores, tile by tile."""

from .api import AttentionStatistics, attention_statistics, attention_weights

__all__ = ["AttentionStatistics", "attention_statistics", "attention_weights"]
