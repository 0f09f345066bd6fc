"""fastai callbacks, each usable on its own in any Learner. `training.parts` lists them in the order of a step."""
