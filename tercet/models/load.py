"""Checkpoints in and out: tokenizers, causal language models, one-label sequence classifiers; models from scratch.

Every model loads in float32 with dropout 0 and is saved as an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tercet.models.precision import round_weights, rounded_parameters
from tercet.models.storage import reads_piecewise, stored_in_bfloat16
from tercet.types import TercetError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

PAD_TOKEN = "<|tercet_pad|>"


def load_tokenizer(source: str, *, trust_remote_code: bool = False, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub name; with `needs_eos` it must have an end-of-text token (encoders need none)."""
    with _explained(source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes up an empty one where there is none
        raise TercetError(
            f"{source}: there is no tokenizer: put the files that belong to the model there, such as tokenizer.json"
        )
    if needs_eos and tokenizer.eos_token_id is None:
        raise TercetError(
            f"{source}: its tokenizer has no end-of-text token, so no response could ever end: set eos_token in tokenizer_config.json"
        )
    return tokenizer


def load_causal_lm(
    source: str,
    *,
    dropout: float = 0.0,
    trust_remote_code: bool = False,
    as_stored: bool = False,
    rounded: bool = False,
) -> PreTrainedModel:
    """A causal language model in float32, on the CPU. as_stored: in bfloat16 where all of its checkpoint is, so that loading takes no memory
    but the pages of its file, which the system takes back as it needs them. rounded: as `round_weights` leaves it, and never in
    memory with more digits than that."""
    with _explained(source, "a causal language model"):
        config = _set_dropout(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code), dropout)
        model, missing = _read(AutoModelForCausalLM, source, config, trust_remote_code, as_stored, rounded)
        _check_complete(missing, source)
        if not rounded:  # what is rounded was looked at before, in preflight, or written by us
            _check_causal(model, source)
    return model


def load_classifier(
    source: str, *, num_labels: int | None = None, trust_remote_code: bool = False, rounded: bool = False
) -> PreTrainedModel:
    """A sequence-classification model in float32, or `rounded` as above. With `num_labels` a causal language model's checkpoint gets a new
    head."""
    with _explained(source, "a sequence-classification model"):
        config = _set_dropout(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code), 0.0)
        if num_labels is not None:
            config.num_labels = num_labels
        model, missing = _read(
            AutoModelForSequenceClassification, source, config, trust_remote_code, as_stored=False, rounded=rounded
        )
        if num_labels is None:
            _check_complete(missing, source)
    return model


def new_causal_lm(
    architecture: str, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, positions: int, seed: int
) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed. `positions` is its context, where not in `options`."""
    try:
        config = AutoConfig.for_model(architecture)
    except ValueError:
        raise TercetError(f"model.scratch.architecture: {architecture!r} is not a model_type of transformers, try gpt2") from None
    length_key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    wanted = {"vocab_size": len(tokenizer), length_key: positions, **options}
    for key, value in wanted.items():
        if not hasattr(config, key):
            raise TercetError(f"model.scratch.options.{key}: {architecture} has no such setting")
        try:
            setattr(config, key, value)
        except Exception as error:  # transformers checks types here, with an exception class of the hub library's
            raise TercetError(
                f"model.scratch.options.{key}: {value!r} is refused: {str(error).strip().splitlines()[-1].strip()}"
            ) from None
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = None
    config.tie_word_embeddings = options.get("tie_word_embeddings", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(_set_dropout(config, 0.0), dtype=torch.float32)
        except Exception as error:  # every architecture fails in its own way on sizes that do not fit together
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TercetError(f"model.scratch.options: {architecture} cannot be built with them: {first}") from None
    _check_causal(model, f"model.scratch.architecture: {architecture}")
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the given texts; <|endoftext|> (id 0) ends a text, nothing is added at the start."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are no text: those with a role, and those that tokenizer.json alone calls special."""
    added = {str(token): place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)) | added


def stop_token_ids(source: str, tokenizer: PreTrainedTokenizerBase, stops: Iterable[str] = ()) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, the list in the checkpoint's generation_config.json, and what of `stops`
    (ppo.stop) are special tokens."""
    try:
        listed = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        listed = None
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    special = special_tokens(tokenizer)
    return sorted({tokenizer.eos_token_id, *listed, *(special[text] for text in stops if text in special)})


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """TercetError if the tokenizer can produce an id that the model has no embedding for."""
    rows = embedding_rows(model)
    entries = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps, so their number says nothing
    if entries > rows:
        raise TercetError(
            f"{source}: the tokenizer needs {entries} embedding rows but the model has only {rows}: they do not belong together; or give the "
            f"model the rows that it lacks, model.resize_token_embeddings({entries}), and save it again"
        )


def count_parameters(source: str, trust_remote_code: bool = False) -> int:
    """Parameters of a causal language model, without loading its weights."""
    with _explained(source, "a causal language model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = without_weights(AutoModelForCausalLM, config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def without_weights(auto_class: Any, config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a configuration describes, on the meta device: it has no memory of its own."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()  # transformers before 5.1 leaves it undone there
    return model.eval()


def _read(
    auto_class: Any, source: str, config: Any, trust_remote_code: bool, as_stored: bool, rounded: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model in float32, `as_stored` in bfloat16 if its checkpoint is, or `rounded`; never from a pickle. And the names of the weights
    that the checkpoint lacks."""
    as_stored = (as_stored or rounded) and stored_in_bfloat16(source)
    if rounded and not as_stored and (model := _read_rounded(auto_class, source, config, trust_remote_code)) is not None:
        return model, []
    model, info = auto_class.from_pretrained(
        source,
        config=config,
        dtype=torch.bfloat16 if as_stored else torch.float32,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if rounded:
        round_weights(model)
    return model, list(info["missing_keys"])


def _read_rounded(auto_class: Any, source: str, config: Any, trust_remote_code: bool) -> PreTrainedModel | None:
    """A checkpoint in float32 as `round_weights` would leave it, read tensor by tensor: transformers keeps its file in memory until all of
    them are there. None if that has to be left to transformers."""
    if getattr(config, "quantization_config", None) is not None or Path(source, "adapter_config.json").exists():
        return None
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception:  # a model's own code may look at its numbers, which are not there
        return None
    model.tie_weights()
    narrow = rounded_parameters(model)
    done = reads_piecewise(model, source, lambda parameter: torch.bfloat16 if id(parameter) in narrow else torch.float32)
    return model.eval() if done else None


def _check_complete(missing: Iterable[str], source: str) -> None:
    """TercetError if weights were absent from the checkpoint, which transformers then fills with random numbers."""
    names = sorted(missing)
    if names:
        raise TercetError(
            f"{source}: the checkpoint lacks {len(names)} of the weights that this kind of model needs, first {names[0]}: it was "
            "saved for another purpose or is incomplete"
        )


@torch.no_grad()
def _check_causal(model: PreTrainedModel, source: str) -> None:
    """TercetError if later tokens change earlier logits: transformers loads encoders such as BERT as "causal" models too."""
    probe = torch.arange(4)[None] % embedding_rows(model)
    other = probe.clone()
    other[0, -1] = 0
    before, after = (model.eval()(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (probe, other))
    if not bool(before.isfinite().all()):
        raise TercetError(f"{source}: its logits are not finite, so its weights are damaged: take another checkpoint")
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-5):
        raise TercetError(
            f"{source}: {type(model).__name__} looks at later tokens, so it is not a causal language model: choose one such as gpt2"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding: ids that may enter the model."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was built for, None where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    temperature: float,
    stop_ids: list[int],
    card: str,
) -> None:
    """Write a policy as AutoModelForCausalLM reads it; its generation config samples exactly as Tercet did.

    The tokenizer is saved with pad = EOS where it has no pad token: harmless, because attention masks go with the ids.
    """
    saved = copy.deepcopy(tokenizer)  # one in use must not change under its users' feet
    if saved.pad_token is None:
        saved.pad_token = saved.eos_token
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, eos_token_id=stop_ids, pad_token_id=saved.pad_token_id
    )
    model.save_pretrained(folder)
    _save_tokenizer(saved, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, card: str) -> None:
    """Write a scorer as AutoModelForSequenceClassification reads it.

    That class looks for the last id that is not pad, so pad must be an id that no text contains: the input
    embedding gets a row of its own for it, behind all rows that could be sampled, unless an earlier save has added it. Where the
    vocabulary is padded, placeholder tokens fill the gap, because a tokenizer numbers its tokens without holes.
    """
    saved = copy.deepcopy(tokenizer)  # one in use must not change under its users' feet
    rows, pad_id = embedding_rows(model), model.config.pad_token_id
    if pad_id is None or pad_id != rows - 1 or pad_id < len(saved) and saved.convert_ids_to_tokens(pad_id) != PAD_TOKEN:
        pad_id = rows
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
    if len(saved) < pad_id:
        saved.add_tokens([f"<|tercet_unused_{i}|>" for i in range(len(saved), pad_id)], special_tokens=True)
    saved.add_special_tokens({"pad_token": PAD_TOKEN})
    assert saved.pad_token_id == pad_id
    saved.padding_side = "right"  # with pads on the left, a model with learned positions reads every text shifted
    model.config.pad_token_id = pad_id
    model.save_pretrained(folder)
    _save_tokenizer(saved, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As AutoTokenizer reads it: of one with code of its own transformers writes one class's name where it reads two."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    own = about.get("auto_map", {}).get("AutoTokenizer")
    if isinstance(own, str):
        about["auto_map"]["AutoTokenizer"] = [None, own] if tokenizer.is_fast else [own, None]
        path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dropout(config: Any, value: float) -> Any:
    """Set every dropout probability of a model's configuration (GPT-2 has three, each of 0.1 by default)."""
    for key, present in list(config.to_dict().items()):
        is_probability = isinstance(present, float | int) and not isinstance(present, bool)
        if is_probability and ("drop" in key and "layer" not in key or key in ("attn_pdrop", "embd_pdrop", "resid_pdrop")):
            setattr(config, key, value)
    for key in ("layerdrop", "layer_dropout", "encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config


@contextlib.contextmanager
def _explained(source: str, wanted: str) -> Any:
    """Turn what from_pretrained raises into one sentence; keep its chatter out of the terminal."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except TercetError:
        raise
    except Exception as error:  # from_pretrained raises OSError, ValueError, SafetensorError, ... by no stated rule
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if os.path.isabs(source) and not os.path.isdir(source):
            first = "there is no such folder"
        elif isinstance(error, KeyError):
            first = f"{first} is missing in one of its files"
        elif "ignore_mismatched_sizes" in first:
            first = "its weights have other sizes than its config.json says"
        hint = " (the hub is switched off or out of reach: give a folder)" if "offline" in first.lower() else ""
        if "trust_remote_code" in str(error):
            hint = " without running its own code, which model.trust_remote_code: true would allow"
        raise TercetError(f"{source}: cannot be loaded as {wanted}{hint}: {first}") from error
