"""What the experiments share: workers, statistics, tables."""
