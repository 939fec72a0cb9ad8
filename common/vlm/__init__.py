"""Vision-language models as learners: prompts, replies and the class that `build` of conf/learner/vlm.yaml names."""
