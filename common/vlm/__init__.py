"""A vision-language model as the learner of a run: conf/learner/vlm.yaml names its `build`."""
