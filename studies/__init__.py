"""Where the numbers of the README come from: comparisons, speed, solvers, costs, and the tables made from results/."""
