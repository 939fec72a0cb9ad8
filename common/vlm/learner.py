"""The learner for vision-language models, and functions that build its parts from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common.config.schema import Config, GRPOConfig, RolloutConfig
from common.cost import estimate
from common.counted import counted
from common.data import manifest
from common.data.loading import make_loader
from common.data.task import TaskData
from common.evaluation.evaluate import evenly_spaced
from common.forward import attention
from common.forward.label_scores import LabelScorer
from common.learner import Learner
from common.models import adapters, files, meter, vlm
from common.models.encoder import PromptEncoder
from common.models.extra_embeddings import detached
from common.models.vision import FeatureStore
from common.plugins import check_call, locate
from common.rollout.base import Decoding, Rollout, check_logprobs_match, sampling_mode
from common.run import doctor, loop
from common.run.checkpoint import Checkpoints, read_state
from common.run.recorder import Recorder
from common.runtime.distributed import gather, rank, world
from common.training.base import Epochs, Trainer, total_updates
from common.training.grpo.trainer import GRPOTrainer
from common.training.reward_mix import bind_rewards, prepare_rewards
from common.training.sft import SFTTrainer
from common.types import Answers, Task, UserError
from common.vlm import check, prompting
from common.vlm.prompting import TaskPrompts, Words
from common.vlm.replies import Replies, greedy

# Parts of the learner, from the configuration: rollout options, encoder, decoding, checks.


def backend_options(config: Config, task_prompts: TaskPrompts) -> dict[str, Any]:
    """Return the arguments of the rollout backend. All ranks call it together.

    They are those of the configuration; if `prompt_tokens` is null there, it becomes what the run's prompts need.
    """
    options = config.rollout.options
    # the default 0 stands for a backend without that option
    if options.get("prompt_tokens", 0) is not None:
        return options
    # rank 0 measures the prompts, the others take over its result
    longest, context = 0, None
    if rank() == 0:
        measure, size = check.check_weights(config), config.model.image_size
        prompts = [prompt for part in (task_prompts.train, *task_prompts.evaluation.values()) for prompt in part]
        longest, context = max(measure.tokens(prompts, size), default=0), measure.context
    longest, context = gather((longest, context))[0]
    return {**options, "prompt_tokens": meter.room(longest, config.rollout.max_completion_tokens, context)}


def check_logprobs(config: Config, backend: object) -> None:
    """Check that the sampler fits the trainer, see `check_logprobs_match`; `backend` is its class or its object."""
    if isinstance(config.trainer, GRPOConfig):
        if config.rollout.overlap and not getattr(backend, "has_weight_copy", False):
            raise UserError(
                "rollout.overlap=true needs a sampler with weights of its own, but this one samples with the policy"
                " that is being updated; use rollout=vllm, or rollout.overlap=false"
            )
        check_logprobs_match(backend, sampling(config.rollout), config.trainer.importance_correction)


def shared_hash(folder: Path) -> str:
    """Return `files.weights_hash`, computed by rank 0 because it reads every weight. All ranks call it together."""
    return gather(files.weights_hash(folder) if rank() == 0 else "")[0]


def make_encoder(config: Config, policy: vlm.VLM, sha256: str, task: Task) -> PromptEncoder:
    """Return the encoder of prompts, with a store of image features if `model.feature_cache_gb` is above 0.

    `sha256`: hash of the weights; features of different weights are stored apart.
    """
    store = None
    if config.model.feature_cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "features" / weights_name(config, sha256)
        store = FeatureStore(folder, int(config.model.feature_cache_gb * 2**30))
    return PromptEncoder(policy, make_loader(config, task), config.model.max_prompt_tokens, store)


def weights_name(config: Config, sha256: str) -> str:
    """Return a name for the initial weights, for caches: their hash and their number format."""
    number_format = {8: "int8", 4: "nf4", None: config.model.dtype}[config.model.bits]
    return f"{sha256[:16]}-{number_format}"


def sampling(config: RolloutConfig) -> Decoding:
    """Return how completions are sampled for training."""
    return Decoding(config.temperature, config.top_k, config.top_p, config.max_completion_tokens)


class VLMLearner(Learner):
    """Learner that answers in text (common/vlm/replies.py) and is trained by GRPO or SFT (common/training/).

    A method that needs more than prompts (ALERT: drafts, images described beforehand, embeddings behind the
    vocabulary) derives from it and overrides the steps in which it differs.
    """

    def __init__(
        self, config: Config, data: TaskData, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> None:
        """Load the model and build sampler, encoder and rewards; arguments as for `Learner`.

        Raises:
            UserError: The weights do not load, have changed since the run began, or the doctor refuses the training.
        """
        self.config, self.data, self.task, self.device = config, data, data.task, device
        self.folder, self.checkpoints = folder, checkpoints
        self.prompting = prompting.of_config(config)
        self.prompts = prompting.ask(self.prompting, self.task)
        manifest.check_sources(folder, self.sources())
        self.updates = total_updates(config.trainer, len(self.task.train.items))
        self.trainer: Trainer | None = None

        # checks that need no weights
        options = backend_options(config, self.prompts)
        check_call(config.rollout.backend, "rollout.backend", options, given=1)
        backend = locate(config.rollout.backend, "rollout.backend")
        check_logprobs(config, backend)
        state = checkpoints.state
        # rewards are needed only if updates are left to do, but one that evaluates is always needed
        learns = isinstance(config.trainer, GRPOConfig) and self.updates > (0 if state is None else state.update)
        needed = self.prompting.evaluates_by(self.task, config.rewards)
        mix = {name: entry for name, entry in config.rewards.items() if learns or name == needed}
        self.rewards = prepare_rewards(mix) if mix else {}
        if needed is not None:
            self.prompting.use_reward(self.rewards[needed].function)
        self.prepare()

        # the model; the seed makes new adapters equal on all ranks
        source = files.weights_folder(config)
        torch.manual_seed(config.seed)
        self.policy = vlm.load(source, config.model, device, train=config.trainer.name != "none")
        attention.install(self.policy.model, config.model.attention)
        self.weights = {"path": str(source), "sha256": shared_hash(source)}
        checkpoints.begin_from(self.weights["sha256"], self.weights["path"])
        # rewards that score with the model need the initial weights: before embeddings are attached or training resumes
        name = weights_name(config, self.weights["sha256"])
        bind_rewards(self.rewards, self.policy, config.rollout.evaluation_batch, name)

        # encoder, sampler and evaluation, for which the model must be complete
        self.setup()
        self.encoder = make_encoder(config, self.policy, self.weights["sha256"], self.task)
        self.rollout: Rollout = backend(self.policy, **options)
        check_logprobs(config, self.rollout)  # again, because a backend may set these attributes in __init__ only
        self.replies = Replies(
            self.encoder,
            LabelScorer(self.policy) if config.label_scoring else None,
            reasoned=config.label_scoring != "direct",
            max_tokens=config.rollout.max_completion_tokens,
            batch=config.rollout.evaluation_batch,
            articles=config.protocol.articles,
        )
        # the final prompts: from here on they do not change
        self.finish_prompts()
        assert self.prompts.prompting.final, "setup or finish_prompts makes the prompts final"
        if config.doctor is not True:  # doctor=true trains nothing and writes nothing
            manifest.freeze_prompts(folder, self.prompts.hashes(), self.sources())

        long = state is None and config.doctor == "auto" and doctor.is_long(self.updates, config.trainer)
        if config.doctor is True or long:
            self.examine()

    def prepare(self) -> None:
        """Make what the method needs before the model is loaded. All ranks call it together."""

    def setup(self) -> None:
        """Attach the method's own parts to the loaded model and make `prompts` final. All ranks call it together."""

    def finish_prompts(self) -> None:
        """Make `prompts` final where that takes the sampler. All ranks call it together, before the weights change."""

    def sources(self) -> dict[str, str]:
        """Return a hash of everything that decides the prompts apart from the data, by its name."""
        return self.prompting.sources(self.task)

    @property
    def decoding(self) -> str:
        return str(greedy(self.config.rollout.max_completion_tokens))

    def predict(self, split: str, limit: int | None = None) -> Answers:
        prompts = evenly_spaced(self.prompts.evaluation[split], limit)
        with self._sampling():
            return self.replies(self.rollout, self.prompts, split, prompts, scored=limit is None)

    def diagnostics(self, split: str, answers: Answers) -> dict[str, Any]:
        return self.prompting.diagnostics(self.task, split, answers)

    def set_task(self, task: Task) -> None:
        old, self.task = self.task, task
        evaluation = {  # prompts of an unchanged split are reused
            split: self.prompts.evaluation[split]
            if old.evaluation.get(split) is each
            else self.prompting.evaluation_prompts(task, split)
            for split, each in task.evaluation.items()
        }
        self.prompts = replace(self.prompts, task=task, evaluation=evaluation)
        self.encoder.set_images(make_loader(self.config, task))

    def train(self, recorder: Recorder) -> int:
        if self.updates:
            self.trainer = self.make_trainer()
            made = loop.train(self, self.trainer, self.updates, self.config, self.checkpoints, recorder, self._save_all)
            if self.config.evaluate == "best":
                self._restore_best(made)
            return made
        return 0

    def save(self, folder: Path) -> None:
        with self._sampling():
            if rank() == 0:
                self.save_weights(folder)

    def save_weights(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads: model (or adapters) and processor. Rank 0 calls it."""
        policy = self.policy
        with detached(policy.model):
            policy.model.save_pretrained(folder)
        # adapters of a hub model name its id and commit as their base, not this machine's cache folder
        if policy.hub is not None and hasattr(policy.model, "disable_adapter"):
            adapters.name_base(folder, *policy.hub)
        policy.processor.save_pretrained(folder)

    @classmethod
    def into_vocabulary(cls, config: Config, policy: vlm.VLM, folder: Path) -> Words | None:
        """Turn embeddings that the method has trained into tokens of the vocabulary, for an export without this code.

        Args:
            config: Configuration of the run.
            policy: Trained model without adapters, and its processor; both are changed.
            folder: Folder that `save` wrote.

        Returns:
            The new tokens; None if only weights were trained.
        """
        return None

    @classmethod
    def kept_files(cls, config: Config, folder: Path) -> tuple[str, ...] | None:
        """Return the files of `folder` that this class needs, beside the weights, to use an exported model.

        None: an export cannot be used by this class, since it needs the training images.
        """
        return ()

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
        self.rollout.close()

    def examine(self) -> None:
        """Examine the training (common/run/doctor.py) and print the findings as a table.

        Raises:
            UserError: A finding is a reason not to train; names it and the fix.
        """
        config = self.config
        assert isinstance(config.trainer, GRPOConfig)
        with self._sampling():
            findings = doctor.examine(
                vlm=self.policy,
                encoder=self.encoder,
                rollout=self.rollout,
                prompts=self.prompts.train,
                rewards=self.rewards,
                decoding=sampling(config.rollout),
                config=config.trainer,
                image_size=config.model.image_size,
                updates=self.updates,
                ranks=world(),
                cost=estimate.of_run(config, self.prompts, Path(self.weights["path"]), world()),
                seed=config.seed,
                open_image=self.task.images.open,
            )
        if rank() == 0:
            Console().print(doctor.report(findings))
        doctor.refuse(findings)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Wrap `Trainer.sampling`; before there is a trainer, sample with the weights as loaded (version 0)."""
        # embeddings on the host catch up with updates that they have skipped, see `OffloadedRows.flush`
        if self.policy.extra_embeddings is not None:
            self.policy.extra_embeddings.flush()
        with sampling_mode(self.rollout, 0) if self.trainer is None else self.trainer.sampling():
            yield

    def make_trainer(self) -> Trainer:
        """Return the trainer, resumed from the last checkpoint if there is one."""
        config, resumed = self.config, self.checkpoints.resumed
        shared: dict[str, Any] = {
            "vlm": self.policy,
            "encoder": self.encoder,
            "rollout": self.rollout,
            "prompts": Epochs(partial(self.prompting.train_prompts, self.task), self.prompts.train),
            "config": config.trainer,
            "deepspeed": config.deepspeed,
            "updates": self.updates,
            "seed": config.seed,
            "resume": None if resumed is None else resumed / "deepspeed",
            "done": 0 if self.checkpoints.state is None else self.checkpoints.state.update,
        }
        if isinstance(config.trainer, GRPOConfig):
            return GRPOTrainer(
                **shared,
                rewards=self.rewards,
                decoding=sampling(config.rollout),
                overlap=config.rollout.overlap,
                open_image=self.task.images.open,
            )
        return SFTTrainer(**shared, loss=config.protocol.sft_loss, reply=self.prompting.label_response)

    def _restore_best(self, made: int) -> None:
        """Load the weights of the best evaluation during training; `made`: number of updates.

        Raises:
            UserError: They were written by another number of ranks, whose optimizer state cannot be read here.
        """
        assert self.trainer is not None
        best = self.checkpoints.best()
        if best is None or read_state(best).update == made:
            return
        if read_state(best).ranks != world():
            raise UserError(
                f"evaluate=best: {best.name} was written by {counted(read_state(best).ranks, 'rank')}, not {world()};"
                " continue on"
                f" as many, or test it by itself: model.path={best / 'model'} trainer=none under another run_name"
            )
        self.trainer.restore(best / "deepspeed", read_state(best).update)

    def _save_all(self, folder: Path) -> None:
        """Write a checkpoint: the engine's state to resume from, and a model folder that loads elsewhere."""
        assert self.trainer is not None
        self.trainer.save(folder / "deepspeed")
        self.save(folder / "model")
