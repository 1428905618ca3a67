"""
Ask an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, a hosted one) many questions at once.

    failed = ask_all(args, {key: request, ...}, received)      # received(key, reply) as each one comes in

Retried, with growing pauses or as Retry-After says: 408, 409, 429, 5xx and connection faults. Any other refusal stops the program with
the server's words: it would meet every request. The openai package's own retries are off, they also obey a header of the server's.

The key comes from an environment variable and is in no file, log or message. A server without keys gets a placeholder.
"""

import asyncio
import email.utils
import os
import random
import sys
import time
from urllib.parse import urlsplit

from tqdm import tqdm

from formats import InputError

RETRIED = (408, 409, 429)  # and all of 5xx
LONGEST_WAIT = 600.0  # seconds; a Retry-After beyond it is a failure, to be asked by a later run
GIVE_UP = 10  # failures in a row after which the rest is not asked: the server is gone
sleep = asyncio.sleep  # tests put their own here


# fmt: off
def add_server_flags(parser):
    group = parser.add_argument_group("asking a server")
    group.add_argument("--base_url", metavar="URL", help="an OpenAI-compatible server, http://localhost:8000/v1 for instance; needs pip install openai")
    group.add_argument("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable that holds the key, if the server wants one (default: %(default)s)")
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests under way at once (default: %(default)s)")
    group.add_argument("--rpm", type=float, metavar="N", help="at most so many requests a minute, retries included (default: no limit)")
    group.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one reply (default: %(default)s)")
    group.add_argument("--retries", type=int, default=5, metavar="N", help="of one request after 408, 409, 429, 5xx or a connection fault (default: %(default)s)")
# fmt: on


def check_server_flags(parser, args):
    url = urlsplit(args.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        parser.error(f"--base_url must begin with http:// or https://, got {args.base_url!r}")
    if "@" in url.netloc or url.query:  # it is written into results
        parser.error(f"--base_url holds a secret or a query; put the key into the environment variable {args.api_key_env}")


class Pace:
    """At most `rpm` starts a minute, evenly spaced; None = no limit. `wait(now)` books the next start -> seconds until then."""

    def __init__(self, rpm):
        self.gap, self.free = 60.0 / rpm if rpm else 0.0, float("-inf")

    def wait(self, now):
        start = max(now, self.free)
        self.free = start + self.gap
        return start - now


def ask_all(args, requests, received):
    """{key: keyword arguments of chat.completions.create} -> {key: why} of those that failed.

    received(key, reply) is called for every reply: text, finish ("stop", "length", ...), model, prompt_tokens, reply_tokens (None where
    the server does not say); or None for a reply that is no chat completion at all. InputError: the server refuses, openai is not there.
    """
    try:
        import openai
    except ImportError:
        raise InputError("asking a server needs the optional package `openai`: pip install openai") from None
    key, failed = os.environ.get(args.api_key_env, "").strip() or "none", {}
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {args.api_key_env} holds no key: characters that no header can carry")
    asyncio.run(_ask_all(openai, args, key, requests, received, failed))  # Ctrl-C cancels what is under way
    return failed


async def _ask_all(openai, args, key, requests, received, failed):
    todo, pace, in_a_row = iter(requests.items()), Pace(args.rpm), 0
    bar = tqdm(total=len(requests), desc="asking", unit=" replies", mininterval=1.0)

    async def worker():
        nonlocal in_a_row
        for name, request in todo:  # one iterator for all workers
            if in_a_row >= GIVE_UP:
                failed[name] = f"not asked: {GIVE_UP} requests failed in a row"
                continue
            reply, why = await _ask(openai, client, request, pace, args, key)
            if why:
                failed[name], in_a_row = why, in_a_row + 1
            else:
                in_a_row = 0
                received(name, reply)
            bar.update()

    try:
        async with openai.AsyncOpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout, max_retries=0) as client:
            await asyncio.gather(*(worker() for _ in range(min(args.concurrency, len(requests)))))
    finally:
        bar.close()
    for why in dict.fromkeys(failed.values()):
        print(f"{args.base_url}: {sum(w == why for w in failed.values())} requests failed: {why}", file=sys.stderr)


async def _ask(openai, client, request, pace, args, key):
    """-> (reply or None, None), or (None, why it failed after all retries)."""
    for attempt in range(args.retries + 1):
        if pause := pace.wait(time.monotonic()):
            await sleep(pause)
        wait = None
        try:
            return read_reply(await client.chat.completions.create(**request)), None
        except openai.APIStatusError as error:
            if error.status_code not in RETRIED and error.status_code < 500:
                raise InputError(_refusal(error, args, request, key)) from None
            why, wait = f"status {error.status_code}", retry_after(error.response.headers)
        except openai.APITimeoutError:
            why = f"no reply within {args.timeout:g} s"
        except openai.APIConnectionError as error:
            why = f"connection fault ({type(error.__cause__ or error).__name__})"
        except UnicodeEncodeError:
            return None, "text that is not valid Unicode"
        except (openai.APIResponseValidationError, ValueError):  # a body that is not JSON
            return None, None
        if wait is not None and wait > LONGEST_WAIT:
            return None, f"{why}, and Retry-After asks for {wait:.0f} s"
        if attempt < args.retries:
            await sleep(backoff(attempt) if wait is None else wait)
    return None, f"{why}, {args.retries + 1} times"


def backoff(attempt):
    """Seconds before retry `attempt` (from 0): 1, 2, 4, ... 60, each shortened by up to a quarter so that many do not come back at once."""
    return min(60.0, 2.0**attempt) * random.uniform(0.75, 1.0)


def retry_after(headers):
    """Seconds the server asks to wait, from a number or a date; None if it does not say."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def read_reply(completion):
    """A chat completion -> text, finish, model, prompt_tokens, reply_tokens; None if it is none."""
    try:
        choice, usage = completion.choices[0], getattr(completion, "usage", None)
        text = choice.message.content
        if not isinstance(text, str | None) or not isinstance(choice.finish_reason, str | None):
            return None
        tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        about = {"finish": choice.finish_reason, "model": completion.model, "prompt_tokens": tokens[0], "reply_tokens": tokens[1]}
        return {"text": text or ""} | about
    except (AttributeError, IndexError, TypeError):
        return None


def _refusal(error, args, request, key):
    body = error.body if isinstance(error.body, dict) else {}
    words = next((str(body[name]) for name in ("message", "detail", "error") if body.get(name)), error.response.text or "no words")
    remedy = {
        401: f"put the key into the environment variable {args.api_key_env}",
        403: f"is the key in {args.api_key_env} allowed to use this model?",
        404: f"check --base_url, which usually ends in /v1, and the model's name {request['model']!r}",
    }  # fmt: skip
    remedy = remedy.get(error.status_code, "check the flags that shape the request, --server if there is one")
    words = words[:400] if key == "none" else words.replace(key, "***")[:400]  # servers like to repeat a key they do not know
    return f"{args.base_url}: the server refuses the request with {error.status_code}: {words} ({remedy})"
