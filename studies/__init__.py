"""Where the numbers of the README come from: comparisons, speed, costs, and the tables made from results/."""
