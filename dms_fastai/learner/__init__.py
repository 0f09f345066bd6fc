"""The Learner: `dms_learner` puts a recipe's parts together, and a loop with little overhead trains them."""

from .learner import DMSLearner, dms_learner

__all__ = ["DMSLearner", "dms_learner"]
