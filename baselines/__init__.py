"""LapFlow and the systems it is compared with, one file each, on the same blocks (model.py), data, solver and scores.

Every file has the same four names:

    network(cfg, channels, condition, side)     what is trained; condition: None, or hidden_size -> Labels or Vectors
    schedule(cfg)                               a schedule.Schedule, or one with other times, states and stages
    loss(model, x1, y, schedule, rng)           as schedule.loss: the mean over the rows of x1, and the errors by band
    sample(model, rng, y, schedule, shape, solve, **solver)     draws x1 from rng's Gaussians with sample.solve

Time runs from noise at 0 to data at 1, scales are counted from the coarsest, i = 0..K-1, in all of them.
"""

from baselines import dfm, edify, lapflow, lfm, pyramidal, separate

SYSTEMS = {"lapflow": lapflow, "lfm": lfm, "pyramidal": pyramidal, "pyramidal-zero-overlap": pyramidal,
           "pixelflow": pyramidal, "edify": edify, "edify-plain": edify, "dfm": dfm, "separate": separate}
