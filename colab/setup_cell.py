# @title Set-up: the course, and what Colab or Kaggle lacks for it
# Finds, unpacks or fetches the course, and runs its colab/setup.py. Nothing is deleted: a folder qlora-course that is
# not from the zip is renamed, and one that is stays as you left it.
import hashlib, importlib.util, os, runpy, stat, subprocess, sys, tempfile, time, zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

repository, version = "GITHUB_REPOSITORY", "COURSE_VERSION"  # owner/name on GitHub; empty: the course comes as a zip
here, course, note = Path.cwd(), Path.cwd() / "qlora-course", "made-from.txt"
upload = "upload qlora-course.zip beside this notebook (Kaggle: as a dataset), wait until it is complete"
shown = {"_render_traceback_": lambda error: [f"The set-up stopped: {error}"]}  # without a traceback
SetUpStopped = type("SetUpStopped", (RuntimeError,), shown)
files = "colab/setup.py", "colab/requirements.txt", "data", "pyproject.toml", "qlora_helpers/__init__.py"
faults = OSError, EOFError, RuntimeError, ValueError, LookupError, StopIteration, BadZipFile, zlib.error
faults += (subprocess.SubprocessError,)
is_course = lambda folder: all((folder / file).exists() for file in files)

# What is found is run, so only these places count: what the lessons would import, where this cell puts the course, a
# mounted Drive, the repository that has this notebook, and on Kaggle the zip's folder in a dataset of any name.
package = importlib.util.find_spec("qlora_helpers")
places = [Path(package.origin).parents[1]] if package and package.origin else []
places += [course, here / "drive/MyDrive/qlora-course"] + [here.parent] * (here.name in ("colab", "notebooks"))
for above in ("", "*/", "*/*/", "datasets/*/*/", "datasets/*/*/*/") if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else ():
    places += sorted(here.parent.glob(f"input/{above}qlora-course"))
found = [place for place in places if is_course(place)]
zips = [*here.glob("qlora-course*.zip"), *here.glob("drive/MyDrive/qlora-course*.zip")]
zips = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in zips if file.is_file()}
made_from, source = next(iter(zips.items()), (f"v{version}", f"https://github.com/{repository}"))
in_place = lambda: is_course(course) and (course / note).is_file() and (course / note).read_text() == made_from
if len(zips) > 1:
    raise SetUpStopped(f"{' and '.join(map(str, zips.values()))} differ: delete all but one, and run this cell again.")
if not (zips or found or repository):
    raise SetUpStopped(f"the course is not here: {upload}, and run this cell again.")
if not (in_place() if zips else found):
    with tempfile.TemporaryDirectory(prefix="qlora-course-new-", dir=here, ignore_cleanup_errors=True) as folder:
        try:
            if zips:
                with ZipFile(source) as archive:
                    entries = archive.infolist()
                    outside = [e for e in entries if e.filename.startswith("/") or ".." in e.filename.split("/")]
                    if outside or any(stat.S_ISLNK(e.external_attr >> 16) for e in entries):
                        raise ValueError("it has a link, or a path to another folder")
                    if len(entries) > 2000 or sum(e.file_size for e in entries) > 100e6:
                        raise ValueError("it has more than 2,000 files, or more than 100 MB")
                    archive.extractall(f"{folder}/course")  # which compares the checksums
            else:
                how = ["--quiet", "--depth=1", f"--branch=v{version}", "--config=advice.detachedHead=false"]
                git, ask = ["git", "clone", *how, source, f"{folder}/course"], {"GIT_TERMINAL_PROMPT": "0"}
                subprocess.run(git, check=True, timeout=300, env=os.environ | ask)
            new = next(filter(is_course, [*Path(folder).glob("*"), *Path(folder).glob("*/*")]))
        except faults as error:
            why, first = str(error) or "files of the course are missing", "delete it, " if zips else ""
            raise SetUpStopped(f"{source} cannot be used ({why}): {first}{upload}, and run this cell again.") from None
        if "qlora_helpers" in sys.modules:
            raise SetUpStopped(f"{source} is new, and the course is in use: restart the session, and run this cell.")
        (new / note).write_text(made_from)
        if os.path.lexists(course) and not in_place():  # another notebook may just have put it there
            old = course.rename(f"{course}-old-{time.strftime('%Y%m%d-%H%M%S')}")
            print(f"The folder qlora-course is not from {source}: it is now {old}, with all that you changed.")
        if not in_place():
            new.rename(course)
chosen = course if zips or not found else found[0]
set_up = runpy.run_path(str(chosen / "colab/setup.py"), {"notebook_version": version, "found": found}, "__main__")
