"""What the Makefile and .ci/run guard against, tested with a Python, a pip and a ruff that only log their calls."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")

# Replaces python3, .venv/bin/python, ruff and jupyter. What FAILS names fails; VERSION is Python's version. A venv
# that fails already has a Python but no pip, as on Debian without python3-venv.
TOOL = """#!/bin/sh
echo "$(basename $0) $*" >> "$LOG"
env | grep -E '^(HF_HUB_OFFLINE|OMP_NUM_THREADS|OMP_WAIT_POLICY|QLORA_RUNS|JUPYTER_CONFIG_PATH)=' > "$LOG.env"
case "$*" in
    "-c import sys;"*) exec "$REAL" -ISc "import sys; sys.version_info = tuple(map(int, '$VERSION'.split('.'))); \\
sys.version = '$VERSION (main)'; exec(sys.argv[1])" "$2" ;;
esac
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
fi
if [ "$1 $2" = "-m pip" ] && ! [ -e "$(dirname $0)/pip" ]; then exit 1; fi
case "$(basename $0) $*" in *"$FAILS"*) exit 1 ;; esac
if [ "$1 $2" = "-m venv" ]; then
    for name in pip ruff jupyter; do cp "$0" "$3/bin/$name"; done
fi
"""


class Course:
    """A checkout of the Makefile and what it reads, with its own python3."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        self.venv, self.ready = folder / ".venv", folder / ".venv" / "ready"
        for name in ("Makefile", "requirements.txt", "pyproject.toml", "colab/requirements.txt",
                     "colab/runtime-packages.txt", "colab/looked-for.txt", ".ci/run",
                     "website/requirements.txt", "tests/website/browser.requirements.txt"):  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "data" / "measured").mkdir(parents=True)
        (folder / "bin").mkdir()
        self.put("python3", TOOL)

    def put(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(script)
        (self.folder / "bin" / name).chmod(0o755)

    def call(self, *command: str, fails: str = "nothing", version: str = "3.12.4") -> subprocess.CompletedProcess:
        """Run a command here; afterwards `asked` has the calls of its Python."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OMP", "HF", "QLORA", "MAKE", "PYTHON", "JUPYTER"))
        }
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "LOG": str(self.log)}
        environment |= {"FAILS": fails, "VERSION": version, "REAL": sys.executable}
        self.log.write_text("")
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        lines = self.log.read_text().splitlines()
        self.asked = [line for line in lines if "-c import sys" not in line]
        return done

    def make(self, target: str, **options: str) -> subprocess.CompletedProcess:
        return self.call("make", target, **options)

    def seen(self) -> dict[str, str]:
        """The environment of the last program that was called."""
        return dict(line.split("=", 1) for line in Path(f"{self.log}.env").read_text().splitlines())


@pytest.fixture
def course(tmp_path) -> Course:
    return Course(tmp_path)


INSTALLS = [
    "python3 -m venv .venv",
    "python -m pip install --quiet --disable-pip-version-check -r requirements.txt",
    "python -m pip install --quiet --disable-pip-version-check --no-deps --editable .",
]
RUN = "python -m qlora_helpers run"


@pytest.mark.parametrize("version", ["3.10.12", "2.7.18"])
def test_an_old_python_is_refused_before_anything_is_made(course, version):
    done = course.make("run", version=version)
    assert (
        done.returncode
        and f"Python 3.11 or newer is needed, this is {version}: name one with  make PYTHON=" in done.stderr
    )
    assert course.asked == [] and not course.venv.exists()


def test_without_the_venv_module_the_package_to_install_is_named_and_helps(course):
    done = course.make("run", fails="-m venv")
    assert done.returncode and "on Debian or Ubuntu install python3-venv first" in done.stdout
    assert "Installing" not in done.stdout  # it did not continue
    assert course.asked == INSTALLS[:1] and not course.ready.exists()
    assert course.make("run").returncode == 0 and course.asked == [*INSTALLS, RUN]


def test_packages_are_installed_once_and_again_only_when_they_change(course):
    assert course.make("run").returncode == 0 and course.asked == [*INSTALLS, RUN]
    assert course.make("run").returncode == 0 and course.asked == [RUN]
    later = course.ready.stat().st_mtime + 5
    os.utime(course.folder / "requirements.txt", (later, later))  # like a fresh checkout of the same file
    assert course.make("run").returncode == 0 and course.asked == [RUN]
    for name in ("requirements.txt", "pyproject.toml"):
        with (course.folder / name).open("a") as file:
            file.write("# changed\n")
        os.utime(course.folder / name, (later := later + 5, later))
        assert course.make("run").returncode == 0 and course.asked == [*INSTALLS[1:], RUN], name


@pytest.mark.parametrize("step", ["-r requirements.txt", "--editable ."])
def test_what_was_not_installed_in_whole_is_installed_the_next_time(course, step):
    assert course.make("run", fails=step).returncode and RUN not in course.asked
    assert not course.ready.exists()
    assert course.make("run").returncode == 0 and course.asked == [*INSTALLS[1:], RUN]


def test_the_website_has_an_environment_of_its_own(course):
    installs = [
        "python3 -m venv .venv-site",
        "python -m pip install --quiet --disable-pip-version-check -r website/requirements.txt",
    ]
    assert course.make("site", fails="-r website").returncode and course.asked == installs
    assert course.make("site").returncode == 0 and course.asked == [installs[1], "python -m website.build"]
    assert course.make("site").returncode == 0 and course.asked == ["python -m website.build"]
    assert not course.venv.exists()


def test_what_opens_the_website_is_installed_only_where_there_is_a_browser(course):
    path = os.environ["PATH"].split(os.pathsep)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    there = any((Path(folder) / name).exists() for folder in path for name in names)
    install = "python -m pip install --quiet --disable-pip-version-check -r tests/website/browser.requirements.txt"
    assert course.make("test-all").returncode == 0 and (install in course.asked) == there
    course.put("chromium", "#!/bin/sh\n")
    (course.folder / ".venv-site" / "browser-ready").unlink(missing_ok=True)
    assert course.make("test-all").returncode == 0 and install in course.asked
    assert course.make("test-all").returncode == 0 and install not in course.asked


def test_tests_run_offline_in_two_workers_of_one_thread_that_do_not_spin(course):
    assert course.make("test").returncode == 0
    assert course.asked[-2:] == ["ruff check --quiet .", "python -m pytest -n 2 -q"]
    assert course.seen() == {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


ATTACK = (
    "python -m pytest -n 2 -q -o python_files=attack_*.py -o python_functions=attack_* --hypothesis-seed=0 tests/attack"
)


@pytest.mark.parametrize(
    ("target", "fault", "last"),
    [
        ("test", "ruff check", "ruff check --quiet ."),
        ("test", "-m pytest", "python -m pytest -n 2 -q"),
        ("test-all", "ruff format", "ruff format --check --quiet ."),
        ("test-all", "-m pytest", "python -m pytest -n 2 -q --everything"),
        ("test-all", "support.kills", "python -m tests.support.kills"),
        ("test-real", "fetch smollm2-135m", "python -m qlora_helpers fetch smollm2-135m"),
        ("test-real", "-m pytest", "python -m pytest -q --real tests/real"),
        ("test-kills", "support.kills", "python -m tests.support.kills"),  # before a pipe
        ("attack", "tests/attack", ATTACK),
        ("mutants", "support.mutants", "python -m tests.support.mutants"),
        ("test-colab", "--everything colab", "python -m pytest -q -p no:anyio --everything colab"),
        (
            "test-colab",
            "test_troubleshooting",
            "python -m pytest -q -p no:anyio -n 2 tests/course/test_troubleshooting.py",
        ),
        ("site", "-m website.build", "python -m website.build"),
        ("lint", "ruff format", "ruff format --check ."),
    ],
)
def test_a_fault_ends_the_target_and_is_its_status(course, target, fault, last):
    assert course.make(target).returncode == 0
    assert course.make(target, fails=fault).returncode
    assert course.asked[-1] == last


LAB = "jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks"


@pytest.mark.parametrize(("user", "allowed"), [("1000", ""), ("0", " --allow-root")])
def test_lab_opens_on_the_lessons_with_the_whole_repository_and_root_is_told_what_that_means(course, user, allowed):
    course.put("id", f'#!/bin/sh\n[ "$*" = -u ] && echo {user}\n')
    done = course.make("lab")
    assert done.returncode == 0 and course.asked[-1] == LAB + allowed
    assert ("You are root, so what a notebook runs may change every file of this machine." in done.stdout) == bool(
        allowed
    )
    assert course.make("lab", fails="jupyter lab").returncode


def test_lab_has_the_course_s_settings_and_keeps_those_that_are_set(course):
    course.make("lab")
    mine = str(course.folder / "notebooks" / "scripts" / "jupyter")
    assert course.seen()["JUPYTER_CONFIG_PATH"] == mine
    course.call("env", "JUPYTER_CONFIG_PATH=/theirs", "make", "lab")
    assert course.seen()["JUPYTER_CONFIG_PATH"] == f"{mine}:/theirs"


def test_jupyterlab_has_the_options_and_settings_that_lab_gives_it():
    """A name that it does not know would be ignored, and the question about news would come."""
    from jupyter_server.serverapp import ServerApp
    from jupyterlab.labapp import LabApp

    for option in LAB.split()[2:]:
        name = option.removeprefix("--").partition("=")[0]
        owner, trait = name.split(".")
        assert trait in {"ServerApp": ServerApp, "LabApp": LabApp}[owner].class_traits(config=True), name
    settings = ROOT / "notebooks" / "scripts" / "jupyter" / "labconfig" / "default_setting_overrides.json"
    for plugin, values in json.loads(settings.read_text(encoding="utf-8")).items():
        schema = Path(LabApp().schemas_dir, *plugin.split(":")).with_suffix(".json")
        known = json.loads(schema.read_text(encoding="utf-8"))["properties"]
        assert values.keys() <= known.keys()
        assert values["fetchNews"] in [choice["const"] for choice in known["fetchNews"]["oneOf"]]


def test_ci_runs_every_suite_and_stops_at_the_first_that_fails(course):
    course.put("make", '#!/bin/sh\necho "make $*" >> "$LOG"\n[ "$*" != "$FAILS" ]\n')
    assert course.call(".ci/run").returncode == 0
    assert course.asked == ["make test-all", "make test-colab", "make attack"]  # test-all has all that test has
    assert course.call(".ci/run", fails="test-colab").returncode and course.asked == [
        "make test-all",
        "make test-colab",
    ]
