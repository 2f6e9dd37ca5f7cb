"""Offline inference: `LLM` runs an engine of its own, in processes of its own, for a program that just wants results.

from cableway import LLM, SamplingParams

with LLM("smollm2-135m") as llm:
    for result in llm.generate(["The sky is", "Water is"], SamplingParams(temperature=0)):
        print(result.outputs[0].text)
"""

import concurrent.futures
import contextlib
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cableway.frontend import batch
from cableway.frontend.batch import BatchRequest, EventLoop
from cableway.frontend.client import EngineClient
from cableway.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from cableway.frontend.params import SamplingParams, fitting
from cableway.frontend.served import decoder_prompt, sampling_defaults
from cableway.frontend.template import ChatTemplate
from cableway.frontend.tokens import Tokenizer, declared_eos_ids
from cableway.frontend.words import leave_nothing, ways_to_say
from cableway.ipc import config as configuration
from cableway.ipc import log as logging
from cableway.ipc import modelfiles
from cableway.ipc.config import Config
from cableway.ipc.server import EngineError, EngineProcesses

__all__ = ["LLM", "CompletionOutput", "EngineError", "Logprob", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}."""
_PROMPT_KEYS = ("prompt", "prompt_token_ids")
Message = dict[str, Any]

_DEFAULTS = {
    "log_level": "error",
    "max_queued_requests": 1 << 30,  # a batch waits here, not in the engine
    "max_queued_tokens": 1 << 40,
}
_OTHER_NAMES = {"enable_prefix_caching": "prefix_cache"}
_SUPERVISION_S = 0.5
_LIVE_PER_SEQUENCE = 2  # enough waiting in the core that a place never stays empty


class LLM:
    """An engine for this program alone, with the names that vLLM's users know.

    It ends with `close()`, at the end of a `with` block, when it is garbage, and with the program, however that ends.
    A process of it that dies is replaced, and what runs goes on.

    Args:
        model: alias, .gguf file, folder or hub id.
        skip_tokenizer_init: work on token ids alone; for models without a tokenizer.
        options: any option of `cableway serve` by its name, such as `dtype`, `device`, `max_model_len`,
            `max_num_seqs`, `max_num_batched_tokens`, `load_format`, `batch_invariant`; None means its default.

    Raises:
        ConfigError, ModelError: an option or the model is wrong.
        EngineError: the engine could not be started; the text says why.
    """

    config: Config
    """What every option resolved to."""

    def __init__(self, model: str = "smollm2-135m", *, skip_tokenizer_init: bool = False, **options: Any):
        given = {_OTHER_NAMES.get(name, name): value for name, value in options.items() if value is not None}
        asked = configuration.options({**_DEFAULTS, **given, "model": str(model)})
        files = modelfiles.locate(asked.model, asked.load_format)
        self._tokenizer = None if skip_tokenizer_init else Tokenizer.load(files)
        self._template = None if skip_tokenizer_init else ChatTemplate.load(files, asked.chat_template or None)
        self._eos_token_ids = self._tokenizer.eos_token_ids if self._tokenizer else declared_eos_ids(files)
        self._defaults = sampling_defaults(files.generation_config) if asked.generation_config == "auto" else {}
        self._decoder_prompt = decoder_prompt(files)
        self._num_requests = 0
        self._is_asleep = False
        self._processes = EngineProcesses(asked)
        self.config = self._processes.config
        self._loop = EventLoop()
        self._client = EngineClient(self.config.frontend, log=logging.private("llm", level=asked.log_level))
        self._closing = weakref.finalize(self, _close, self._processes, self._loop, self._client)
        self._loop.start(self._client.start()).result()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; results in their order.

        Args:
            prompts: one prompt, or a list of them.
            sampling_params: for all, or one for each; None = the model's own defaults.
            use_tqdm: show progress.

        Raises:
            ValueError: a prompt or its parameters cannot be; nothing was run.
            RequestError: the engine could not finish one of them.
            EngineError: the engine's processes could not be kept alive.
        """
        several = _as_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        for params in [sampling_params] if isinstance(sampling_params, SamplingParams) else sampling_params:
            if not isinstance(params, SamplingParams):
                raise ValueError("sampling_params are SamplingParams, for all prompts or one for each")
            params.check()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(several)
        if len(sampling_params) != len(several):
            raise ValueError(f"{len(several)} prompts, but {len(sampling_params)} sampling_params")
        requests = [self._request(*pair) for pair in zip(several, sampling_params, strict=True)]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's chat template.

        Args:
            messages: dictionaries with `role` and `content`, in order.
            chat_template: Jinja2 source in place of the model's own.

        Raises:
            RequestError: the template does not take these messages.
            ValueError, RequestError, EngineError: as `generate`.
        """
        template, tokenizer = self._template, self.get_tokenizer()
        if chat_template is not None:
            template = ChatTemplate({"default": chat_template}, tokenizer.special_tokens, "chat_template")
        assert template is not None
        conversations: Any = [messages] if not messages or isinstance(messages[0], dict) else messages
        prompts = []
        for conversation in conversations:
            if not all(isinstance(message, dict) for message in conversation):
                raise ValueError("messages are dictionaries with role and content, or lists of these")
            text = template.render(
                [_with_text_content(message) for message in conversation],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ValueError under `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise ValueError("this LLM has no tokenizer (skip_tokenizer_init=True): use prompt_token_ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors would have."""
        return SamplingParams.with_defaults(self._defaults)

    def sleep(self, level: int = 1) -> None:
        """Give the memory of a GPU back until `wake_up`; weights wait in the host's, the KV cache is dropped.

        Raises:
            ValueError: another level than 1.
            EngineError: the engine's processes could not be kept alive.
        """
        if level != 1:
            raise ValueError("level has to be 1: weights go to the host's memory")
        self._carry_out(self._client.set_asleep, True)
        self._is_asleep = True

    def wake_up(self) -> None:
        """Take the memory again that `sleep` gave back; EngineError when the engine cannot."""
        self._carry_out(self._client.set_asleep, False)
        self._is_asleep = False

    def close(self) -> None:
        """End the engine's processes; the second time does nothing."""
        self._closing()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> BatchRequest:
        text, ids = self._tokenized(prompt)
        limits = self.config.frontend
        num_left = limits.max_model_len - len(self._decoder_prompt or ids)
        if not ids:
            raise ValueError("a prompt needs at least one token")
        if num_left < 1 or len(ids) > limits.max_model_len:
            raise ValueError(f"a prompt of {len(ids)} tokens leaves no room in max_model_len = {limits.max_model_len}")
        if self._decoder_prompt and params.prompt_logprobs is not None:
            raise ValueError("an encoder takes the prompt of this model: it has no log-probabilities")
        for token_id in (*ids, *params.token_ids()):
            if not 0 <= token_id < limits.vocab_size:
                raise ValueError(f"token id {token_id} is not in the vocabulary of {limits.vocab_size} tokens")
        if max(params.logprobs or 0, params.prompt_logprobs or 0) > limits.max_logprobs:
            raise ValueError(f"logprobs and prompt_logprobs are at most max_logprobs = {limits.max_logprobs}")
        if params.stops:
            self.get_tokenizer()
        self._num_requests += 1
        bad_words = ways_to_say(params.bad_words, self.get_tokenizer()) if params.bad_words else ()
        sampling = params.sampling(num_left, self._eos_token_ids, bad_words)
        if leave_nothing(sampling):
            raise ValueError("no token of allowed_token_ids is left by bad_words and min_tokens")
        return BatchRequest(str(self._num_requests - 1), text, ids, params, sampling, self._decoder_prompt)

    def _tokenized(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, ids = prompt, None
        else:
            text, ids = None, prompt
        if ids is None and not isinstance(text, str):
            raise ValueError("a prompt is a str, a list of token ids, or a dict with prompt or prompt_token_ids")
        for name, value in prompt.items() if isinstance(prompt, Mapping) else ():
            if name not in _PROMPT_KEYS and value:
                raise ValueError(f"{name} of a prompt is not supported")
        if ids is not None:
            return text, fitting(ids, list[int], "prompt_token_ids")
        assert text is not None
        return text, self.get_tokenizer().encode(text)

    def _run(self, requests: list[BatchRequest], show_progress: bool) -> list[RequestOutput]:
        if self._is_asleep:
            raise ValueError("this LLM sleeps: call wake_up() first")
        results: dict[str, RequestOutput] = {}
        with _progress(len(requests), show_progress) as advance:

            def on_result(result: RequestOutput) -> None:
                results[result.request_id] = result
                advance(result)

            max_live = max(self.config.core.max_num_seqs * _LIVE_PER_SEQUENCE, 1)
            self._carry_out(batch.run, self._client, requests, self._tokenizer, max_live, on_result)
        return [results[request.request_id] for request in requests]

    def _carry_out(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Until it is done; an interrupt, or the end of the engine, ends what it does. ValueError when closed."""
        if not self._closing.alive:
            raise ValueError("this LLM is closed")
        future = self._loop.start(work(*arguments))
        try:
            while not concurrent.futures.wait([future], timeout=_SUPERVISION_S).done:
                if self._processes.failure is not None:
                    raise self._processes.failure
        except BaseException:
            future.cancel()
            raise
        future.result()


def _close(processes: EngineProcesses, loop: EventLoop, client: EngineClient) -> None:
    loop.start(_disconnect(client)).result()
    loop.close()
    processes.close()


async def _disconnect(client: EngineClient) -> None:
    client.close()
    if client.failed.done():
        client.failed.exception()  # whoever was waiting has been told


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Always a list: a list of numbers is one prompt, and so is what cannot be several."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    several: list[Any] = list(prompts)
    return [several] if several and isinstance(several[0], Number) else several


def _with_text_content(message: Message) -> Message:
    """Content given as text parts, as one text: what most templates take."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part, dict) and "text" in part for part in content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


@contextlib.contextmanager
def _progress(num_requests: int, shown: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar on stderr with the tokens a second; the function given is called with each result."""
    console = Console(stderr=True)
    columns = (TextColumn("Prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    rates = TextColumn("in {task.fields[num_in]:.0f} · out {task.fields[num_out]:.0f} tok/s")
    with Progress(*columns, rates, console=console, disable=not shown) as bar:
        task_id = bar.add_task("prompts", total=num_requests, num_in=0.0, num_out=0.0)
        (task,) = bar.tasks
        counts = [0, 0]

        def advance(result: RequestOutput) -> None:
            counts[0] += len(result.prompt_token_ids)
            counts[1] += sum(len(output.token_ids) for output in result.outputs)
            elapsed_s = max(task.elapsed or 0.0, 1e-3)
            bar.update(task_id, advance=1, num_in=counts[0] / elapsed_s, num_out=counts[1] / elapsed_s)

        yield advance
