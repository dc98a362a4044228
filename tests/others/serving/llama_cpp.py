"""Runs llama.cpp's own tests of its server against `lora-jax serve`, with their model.

    python llama_cpp.py PATH    # llama.cpp's folder tools/server/tests

Their model is stories260K, to which llama.cpp gives the chat template "chatml". The tests are
copied, and these lines of the copies are adapted: names of models that no server has, the prefix
of llama.cpp's system_fingerprint, `content: null` in place of "" in the first chunk of a chat, the
text that llama.cpp draws at random, and its names of the fields of /tokenize. Prints each test that
failed and why.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import server

FILES = ("test_chat_completion.py", "test_completion.py", "test_compat_oai_responses.py",
         "test_tokenize.py", "test_security.py")  # fmt: skip
KEY = "sk-this-is-the-secret-key"
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ADAPTED = (
    (
        r"\"(davinci-002|gpt-3\.5-turbo(-instruct)?|gpt-4\.1|codellama70b|llama-test-model)\"",
        '"stories260K"',
    ),
    (r"\.startswith\(\"b\"\)", '.startswith("")'),
    (r"(delta(?:\"\]\[\"|\.)content(?:\"\])?) is None", r'\1 in (None, "")'),
    (r"\"(But she|\(Suddenly|\(Aside|Whillicter|\(going)(\\\"|[^\"\n])*\"", '""'),
    (r"\"content\": (content|\" \" \+)", r'"prompt": \1'),
    (r"_detok\.body\[\"content\"\]", '_detok.body["prompt"]'),
    (r"\"add_special\"", '"add_special_tokens"'),
    (r"^import wget$", ""),  # loads models, which are there
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", type=pathlib.Path)
    theirs = parser.parse_args().tests
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder, "stories260K")
        shutil.copytree(server.STORIES, model)
        (model / "chat_template.jinja").write_text(CHATML)
        tests = pathlib.Path(shutil.copytree(theirs, pathlib.Path(folder, "tests")))
        for path in (tests / "utils.py", *(tests / "unit" / name for name in FILES)):
            text = path.read_text()
            for pattern, new in ADAPTED:
                text = re.sub(pattern, new, text, flags=re.MULTILINE)
            path.write_text(text)
        # n_predict and parallel as in their preset of the model.
        flags = ["--model", model, "--slots", 2, "--max-tokens", 128]
        failed = 0
        for names, more in ((FILES[:4], ()), (FILES[4:], ("--api-key", KEY))):
            with server.running(*flags, *more) as url:
                port = url.rpartition(":")[2]
                failed |= subprocess.run(
                    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line",
                     "-rA", *(f"unit/{name}" for name in names)],
                    cwd=tests, env={**os.environ, "DEBUG_EXTERNAL": "1", "PORT": port},
                ).returncode  # fmt: skip
    return failed


if __name__ == "__main__":
    sys.exit(main())
