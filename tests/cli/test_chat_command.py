"""The chat in the terminal: history, commands, pipes, Ctrl-C; with a scripted engine."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import cli
import fake_engine
import pytest
import tiny_tokenizer

from lora_jax import errors, tokenizer
from lora_jax.cli import chat, conversation
from lora_jax.generation import config, request

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}_{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    read = tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))
    read.chat_template = TEMPLATE
    return read


@pytest.fixture
def started(reader):
    """Makes conversations: started(script, engine's arguments, **of the conversation)."""
    engines = []

    def make(script=None, *, adapters=("mine", "other"), context=400, **how):
        script = script or fake_engine.saying("Hel", "lo")
        engines.append(fake_engine.Engine(reader, script, adapters=adapters, context=context))
        engines[-1].start()
        how.setdefault("sampling", config.Sampling())
        return conversation.Conversation(engines[-1], "base", **how), engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def piped(monkeypatch, capsys):
    """Gives lines to a conversation; returns what it prints, and on the error output."""

    def run(talk, *lines, is_terminal=False):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        conversation.Terminal(talk, is_terminal=is_terminal).run()
        return capsys.readouterr()

    return run


def asked(reader, made):
    return reader.decode(made.prompt).removeprefix("<s>").strip()


def test_a_chat_is_rendered_as_in_training(started, piped, reader):
    talk, engine = started(system="be nice")
    out, err = piped(talk, "a  b ", "", "c")
    assert (out, err) == ("Hello\nHello\n", "")
    texts = [asked(reader, made) for made in engine.asked]
    assert texts == ["<system>be nice_<user>a  b_<assistant>",
                     "<system>be nice_<user>a  b_<assistant>Hello_<user>c_<assistant>"]  # fmt: skip
    messages = [{"role": "system", "content": "be nice"}, *talk.messages[:2],
                {"role": "user", "content": "c"}]  # fmt: skip
    ids = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert [*engine.asked[1].prompt] == ids["input_ids"]
    assert engine.asked[0].adapters == {}


def test_commands_choose_who_answers(started, piped):
    talk, engine = started(adapter="mine")
    out, err = piped(talk, "a", "/base", "a", "/adapter other", "a", "/adapter")
    assert [made.adapters for made in engine.asked] == [{"mine": 1.0}, {}, {"other": 1.0}]
    assert out == "Hello\n" * 3
    assert err.splitlines() == ["(base answers)", "(adapters: mine, other; other answers)",
                                "(adapters: mine, other; other answers)"]  # fmt: skip


def test_reset_and_system_change_what_the_model_sees(started, piped, reader):
    talk, engine = started()
    piped(talk, "a", "/system be nice", "b", "/reset", "c", "/system", "d", "//e", "/exit", "f")
    texts = [asked(reader, made) for made in engine.asked]
    assert texts == [
        "<user>a_<assistant>",
        "<system>be nice_<user>a_<assistant>Hello_<user>b_<assistant>",
        "<system>be nice_<user>c_<assistant>",
        "<user>c_<assistant>Hello_<user>d_<assistant>",
        "<user>c_<assistant>Hello_<user>d_<assistant>Hello_<user>/e_<assistant>",
    ]


def test_compare_shows_both_answers_and_keeps_the_adapters(started, piped):
    def script(made):
        text = "adapted" if made.adapters else "plain"
        yield request.Piece(text, (5,), finish_reason="stop")

    talk, engine = started(script, adapter="mine")
    out, _ = piped(talk, "/compare", "a", "/compare", "b")
    assert out == "[base]\nplain\n[mine]\nadapted\nadapted\n"
    assert engine.asked[0].prompt == engine.asked[1].prompt
    assert [each["content"] for each in talk.messages] == ["a", "adapted", "b", "adapted"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "did you mean reset?"),
        ("/etc/passwd is a file", "// begins a message"),
        ("/adapter min", "did you mean mine?"),
        ("/base now", "found: /base now"),
        ("/compare", "an adapter to compare"),
        ("caf\udce9", "expected: text in UTF-8"),  # Latin-1, as Python reads it
    ],
)
def test_a_wrong_command_is_an_error_that_changes_nothing(started, piped, capsys, line, message):
    talk, engine = started()
    with pytest.raises(errors.UserError) as caught:
        piped(talk, line)
    assert message in " ".join(str(caught.value).split())
    capsys.readouterr()
    out, err = piped(talk, line, "a", is_terminal=True)  # a terminal goes on
    assert err.startswith("error:\n  expected:") and "Hello\n" in out
    assert [made.adapters for made in engine.asked] == [{}]


def test_a_full_context_names_reset_and_leaves_the_chat(started, piped):
    talk, engine = started(context=40)
    with pytest.raises(errors.UserError) as caught:
        piped(talk, "a", "b" * 40)
    assert "the model's context of 40 tokens" in str(caught.value) and "/reset" in str(caught.value)
    assert len(talk.messages) == 2 and len(engine.asked) == 1


def test_an_answer_takes_the_rest_of_the_context_and_says_when_it_is_cut(started, piped, reader):
    talk, engine = started(fake_engine.saying(*"abcdefgh" * 9), context=40)
    out, err = piped(talk, "a")
    room = 40 - len(engine.asked[0].prompt)
    assert engine.asked[0].sampling.max_new_tokens == room
    assert out == ("abcdefgh" * 9)[:room] + "\n" and "/reset begins a new chat" in err

    talk, engine = started(fake_engine.saying(*"abcdefgh"), most=3)
    assert piped(talk, "a") == ("abc\n", "(cut after --max-new-tokens 3)\n")


def test_messages_have_seeds_of_their_own(started, piped):
    talk, engine = started(sampling=config.Sampling(temperature=1.0, seed=7))
    piped(talk, "a", "b")
    assert [made.sampling.seed for made in engine.asked] == [7, 8]


def test_a_terminal_obeys_no_answer(started, piped):
    talk, _ = started(fake_engine.saying("a\x1b[2J", "\tb\n", "\x9bc"))
    out, _ = piped(talk, "a", is_terminal=True)
    assert "a\ufffd[2J\tb\n\ufffdc\n" in out


def test_a_template_without_a_system_role_refuses_it(started, reader, monkeypatch):
    monkeypatch.setattr(reader, "chat_template",
                        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
                        "{% endif %}" + TEMPLATE)  # fmt: skip
    talk, _ = started()
    for refuse in (lambda: started(system="x"), lambda: talk.use_system("x")):
        with pytest.raises(errors.UserError, match="no system"):
            refuse()
    talk.ask("a")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(started, monkeypatch, capsys):
    def script(made):
        yield request.Piece("Hel", (5,))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert made.aborted.wait(10)
        yield request.Piece("lo", (6,))

    talk, _ = started(script)
    lines = iter(["a", "b", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    before = signal.getsignal(signal.SIGINT)
    conversation.Terminal(talk, is_terminal=True).run()
    assert capsys.readouterr().out == "Hel\n(stopped)\n" * 2
    assert [each["content"] for each in talk.messages] == ["a", "Hel", "b", "Hel"]
    assert signal.getsignal(signal.SIGINT) is before


# A chat whose model is a stub, at a terminal of its own.
AT_A_TERMINAL = """
import fcntl, termios, threading
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C there is a signal here
from lora_jax.cli import conversation
from lora_jax.generation import config, request

class Stub:
    base, adapter, adapters, context = "base", None, (), 99
    def ask(self, text):
        made = request.Request((1,), config.Sampling(), {})
        def answer():
            made.emit(request.Piece("you said " + text, (1,)))
            wait = text == "wait" and made.aborted.wait(60)
            made.emit(request.Piece(finish_reason="abort" if wait else "stop"))
        threading.Thread(target=answer, daemon=True).start()
        return [("base", made)]
    def keep(self, text, answer): pass

conversation.Terminal(Stub(), is_terminal=True).run()
print("ended well")
"""


def test_at_a_terminal_ctrl_c_stops_answers_and_twice_at_the_prompt_the_chat():
    leader, follower = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL],
        cwd=cli.ROOT, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def shows(text, seconds):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select.select([leader], [], [], 1)[0]:
                seen += os.read(leader, 4096).decode()
        return text in seen

    def until(text):
        nonlocal seen
        assert shows(text, 60), seen
        seen = seen.partition(text)[2]

    def press_until(text):
        """Python notices Ctrl-C between a prompt and the read after it only with the next one."""
        for _ in range(10):
            typed("\x03")
            if shows(text, 2):
                break
        until(text)

    def typed(text):
        os.write(leader, text.encode())

    until("> ")
    typed("wait\n")
    until("you said wait")
    typed("\x03")
    until("(stopped)")
    until("> ")
    typed("hello\n")
    until("you said hello")
    until("> ")
    press_until("Ctrl-C again")
    until("> ")
    typed("again\n")  # in between, so that the next one is the first
    until("you said again")
    until("> ")
    press_until("Ctrl-C again")
    until("> ")
    press_until("ended well")
    assert running.wait(60) == 0
    os.close(leader)


# ---------------------------------------------------------------------- the command


def test_settings_are_those_of_the_flags(tmp_path):
    typed = chat.parse(["--adapter", "a=x/y", "--adapter", "runs/b/adapter", "--system", "S",
                        "--temperature", "0.5", "--top-p", "0.9", "--max-new-tokens", "9",
                        "--context", "64", "--seed", "3", "--use-4bit"])  # fmt: skip
    settings = chat.settings_of(typed)
    assert settings.adapters == {"a": "x/y", "b": "runs/b/adapter"}
    assert (settings.system, settings.context, settings.most) == ("S", 64, 9)
    sampling = settings.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 3)
    assert settings.base.quant == "int4"


def test_wrong_flags_are_all_named_at_once():
    message = cli.refused("chat", "--top-k", 3, "--max-new-tokens", 0, "--context", 0)
    for part in ("--top-k at temperature 0", "max_new_tokens 0", "--context 0"):
        assert part in message


def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded():
    message = cli.refused("chat", "--model", cli.BASE)
    assert "a model with a chat template" in message and "generate" in message
