"""A conversation with a model on a terminal, or over pipes with a line per turn."""

from __future__ import annotations

import signal
import sys

from lightning_llm.data.tokenizer import Message
from lightning_llm.generation.prompts import Prompt, encode_prompt
from lightning_llm.generation.replies import Reply, reply_to
from lightning_llm.generation.speaker import Speaker
from lightning_llm.settings import UserError

COMMANDS = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops a reply"
TERMINATED = 128 + signal.SIGTERM


class Conversation:
    """What was said so far; each reply is said into standard output while it comes."""

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget all that was said."""
        self.messages = []

    def say(self, content: str) -> None:
        """Answer a user's turn. A reply that is interrupted ends where it is, and so it is remembered.

        Raises:
            UserError: the conversation has become too long; the turn is forgotten.
        """
        turn: Message = {"role": "user", "content": content}
        prompt = Prompt("conversation", [*self.messages, turn])
        ids = encode_prompt(prompt, self.speaker.tokenizer, "chat", self.speaker.config.system)
        self.speaker.check("conversation", ids)
        said: list[str] = []

        def hear(number: int, piece: str, reply: Reply | None) -> None:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        try:
            reply_to(self.speaker, [ids], conversations=[True], hear=hear)
        except KeyboardInterrupt:
            pass
        finally:
            print(flush=True)
        self.messages += [turn, {"role": "assistant", "content": "".join(said)}]


def chat(speaker: Speaker) -> None:
    """Take turns until the input ends or the user does.

    Raises:
        UserError: the model has no chat template.
    """
    if not speaker.tokenizer.has_chat_template:
        raise UserError("chat", "the model has no chat template", "Use lightning-llm generate, which continues texts")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))  # Ctrl-C alone stops a reply
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401  (makes `input` edit lines and remember them)

        print(COMMANDS, file=sys.stderr)
    conversation = Conversation(speaker)
    while True:
        try:
            if not take_turn(conversation, "> " if is_terminal else ""):
                return
        except KeyboardInterrupt:  # not while a reply is said
            print(f"\n{COMMANDS}", file=sys.stderr)
        except EOFError:
            print(end="\n" if is_terminal else "")
            return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def take_turn(conversation: Conversation, prompt: str) -> bool:
    """Read a line and do what it asks; whether there is to be another."""
    line = input(prompt).strip()
    if line == "/reset":
        conversation.reset()
    elif line.startswith("/") and " " not in line and line != "/exit":
        print(f"{line} is no command: {COMMANDS}", file=sys.stderr)
    elif line and line != "/exit":
        conversation.say(line)
    return line != "/exit"
