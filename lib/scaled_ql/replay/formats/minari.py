"""Minari datasets of Atari games: episodes of L actions and L + 1 observations, in HDF5 or Arrow files.

Each episode is a separate part. The package ``minari`` is an extra: ``pip install -e "lib[minari]"``.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from isal import isal_zlib

from scaled_ql.games import NUM_ACTIONS, UnknownGame, action_names
from scaled_ql.replay import format as fmt
from scaled_ql.replay.format import FRAME_SHAPE, ReplayError
from scaled_ql.replay.formats import importing
from scaled_ql.replay.formats.importing import OnProgress, Part, Plan, Report, RowWriter, Unreadable
from scaled_ql.replay.formats.rl_unplugged import bad_steps, write_episode

if TYPE_CHECKING:
    from minari import MinariDataset

STICKY_ACTIONS = 0.25  # default of ale_py.AtariEnv
FRAME_SKIP = 4  # likewise
BLOCK = 512  # frames converted together


def import_minari(
    dataset: "MinariDataset | str | os.PathLike",
    destination: str | os.PathLike,
    game: str | None = None,
    run: int = 1,
    *,
    skip_bad: bool = False,
    workers: int = 0,
    scheduler: str = "",
    progress: OnProgress | None = None,
) -> Report:
    """Import a Minari dataset of one Atari game; a killed import resumes when it is called again.

    Observations are uint8: grey [H, W]; stacks [n, 84, 84] or [84, 84, n], the newest frame last, of which that one
    is taken; or colour [H, W, 3]. Colour becomes grey as 0.299 R + 0.587 G + 0.114 B (OpenCV's rounding), which in the
    frames of the 45 games is bit for bit ALE's own grey; then all but 84 x 84 is resized by area, as the environments
    do. Two differences from their frames remain: Minari stores images as JPEG by default, and a frame recorded without
    the maximum over two emulator frames does not get it here, so sprites may flicker.

    The last observation is stored as the state after the last action. Actions index the game's minimal set, or the
    full one of 18. A step with an action outside the game's set, or a non-finite reward, is left out and cuts
    its episode in two. One episode at a time is in memory, as Minari reads it.

    Args:
        dataset: a dataset, its id in the local Minari folder, or the folder of one.
        destination: the dataset's folder, on a local disk.
        game: name as in the paper; None: that of the dataset's environment.
        run: number of the recording.
        skip_bad: skip an episode that cannot be read, and list it in the report and in ``import.json``.
        workers: processes that convert episodes in parallel; 0: this one.
        scheduler: address of a running Dask scheduler to use instead, whose workers see both folders.
        progress: called with (episodes done, episodes known).

    Returns:
        the report; a row is the episode's number in the dataset.

    Raises:
        ReplayError: Minari is not installed, there is no such dataset, its game is unknown, its spaces are unsupported,
            or an episode cannot be read.
    """
    opened, destination = _open(dataset), fmt.local_folder(destination)
    if game is None:
        game = game_of(opened.id, opened.env_spec)
    try:
        actions = action_names(game)
    except UnknownGame as error:
        raise ReplayError(f"{opened.id}: {error} Name the game with the argument game.") from error

    def plan(game: str, run: int) -> Plan:
        return plan_recording(opened, destination, game, run, actions)

    return importing.run_import(
        destination, [(game, run)], plan, convert,
        order_by=["row"], skip_bad=skip_bad, workers=workers, scheduler=scheduler, progress=progress,
    )  # fmt: skip


def _open(dataset: "MinariDataset | str | os.PathLike") -> "MinariDataset":
    try:
        import minari
    except ImportError as error:
        raise ReplayError(
            f'{dataset}: the package minari is needed to read it ({error}). Install it: pip install -e "lib[minari]".'
        ) from error
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if str(dataset).startswith("file://"):
        dataset = importing.open_source(dataset)[1]
    try:
        folders = [folder for folder in (Path(dataset), Path(dataset) / "data") if (folder / "metadata.json").is_file()]
        if not folders:
            _expect_dataset(Path(dataset))
    except OSError as error:
        raise ReplayError(f"{dataset}: cannot be read ({error}). Check the name and your permissions.") from error
    try:
        return minari.MinariDataset(folders[0]) if folders else minari.load_dataset(str(dataset))
    except Exception as error:  # asserts, and what its storages and spaces raise
        raise ReplayError(
            f"{dataset}: not a Minari dataset ({type(error).__name__}: {error}). Expected the id of one below "
            "$MINARI_DATASETS_PATH, or the folder of one, with a metadata.json in it or in its folder data."
        ) from error


def _expect_dataset(path: Path) -> None:
    """Refuse a folder of datasets, or a file in one; an id, or an absent path, passes."""
    if path.is_file():
        raise ReplayError(f"{path}: is a file. Expected the folder of a dataset: {path.parent}.")
    below = sorted(file.parent for depth in range(2, 5) for file in path.glob("*/" * depth + "metadata.json"))
    if below:
        more = f", and {len(below) - 3} more" if len(below) > 3 else ""
        raise ReplayError(
            f"{path}: is a folder of datasets. Expected the folder of one: {', '.join(map(str, below[:3]))}{more}."
        )


@lru_cache(maxsize=1)
def _keep_open(folder: str, crc32: int) -> "MinariDataset":
    """Keep a dataset open for many episodes: reading its spaces, text with every pixel's bounds, takes 0.3 s."""
    return _open(folder)


def game_of(dataset: str, spec: EnvSpec | None) -> str:
    """The game of an environment: ``ALE/Breakout-v5`` and ``BreakoutNoFrameskip-v4`` are Breakout.

    Raises:
        ReplayError: the dataset names no environment.
    """
    if spec is None:
        raise ReplayError(f"{dataset}: names no environment. Name the game with the argument game.")
    return spec.name.removesuffix("NoFrameskip").removesuffix("Deterministic")


def plan_recording(dataset: "MinariDataset", destination: Path, game: str, run: int, actions: tuple[str, ...]) -> Plan:
    """Plan the place of each episode's rows.

    Raises:
        ReplayError: unsupported spaces, no episodes, or the destination cannot be written.
    """
    path, target, space = Path(dataset.storage.data_path), destination / game / str(run), dataset.observation_space
    if not isinstance(space, Box) or space.dtype != np.uint8:
        raise ReplayError(f"{path}: observations are {space}, expected a Box of uint8.")
    if frame_kind(space.shape) is None:
        raise ReplayError(
            f"{path}: observations are uint8 {list(space.shape)}, expected grey [H, W], stacks [n, 84, 84] or "
            "[84, 84, n], or colour [H, W, 3]."
        )
    indices = action_indices(dataset, path, game, actions)
    crc32 = _crc32(path)
    parts, row = [], 0
    episodes = [int(number) for number in dataset.episode_indices]
    for place, (number, length) in enumerate(zip(episodes, _lengths(dataset, path, episodes))):
        content = {"crc32": crc32, "episode": number, "length": length, "row": row, "actions": indices}
        parts.append(Part(str(target), place, f"{path.name} episode {number}", content, str(path.parent)))
        row += length + 1
    if not parts:
        raise ReplayError(f"{path}: has no episodes.")
    manifest = fmt.make_manifest(
        game,
        run,
        actions=list(actions),
        source=f"Minari {dataset.id}",
        **rules_of(dataset.env_spec, space.shape, len(indices) > len(actions)),
    )
    importing.prepare_recording(target, row, manifest, parts)
    return Plan(manifest, parts, {})


def _crc32(path: Path) -> int:
    """CRC-32 of a dataset's files and their names: equal for copies, wherever they are and whenever written.

    Raises:
        ReplayError: a file cannot be read.
    """
    crc32, block = 0, bytearray(1 << 20)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        crc32 = isal_zlib.crc32(str(file.relative_to(path)).encode(), crc32)
        try:
            with file.open("rb") as content:
                while count := content.readinto(block):
                    crc32 = isal_zlib.crc32(memoryview(block)[:count], crc32)
        except OSError as error:
            raise ReplayError(f"{file}: cannot be read ({error}). Check your permissions and the disk.") from error
    return crc32


def _lengths(dataset: "MinariDataset", path: Path, episodes: list[int]) -> list[int]:
    try:
        return [int(metadata["total_steps"]) for metadata in dataset.storage.get_episode_metadata(episodes)]
    except Exception as error:
        raise ReplayError(
            f"{path}: its list of episodes cannot be read ({type(error).__name__}: {error}). The dataset is damaged; "
            "download or record it again."
        ) from error


def action_indices(dataset: "MinariDataset", path: Path, game: str, actions: tuple[str, ...]) -> list[int]:
    """Index in the game's minimal set of each action of a dataset; -1 where the game lacks it.

    Raises:
        ReplayError: the actions are neither the minimal nor the full set.
    """
    space = dataset.action_space
    if isinstance(space, Discrete) and space.start == 0:
        if space.n == len(actions):
            return importing.action_indices(actions, "minimal")
        if space.n == NUM_ACTIONS:
            return importing.action_indices(actions, "full")
    raise ReplayError(
        f"{path}: actions are {space}; expected Discrete({len(actions)}), the minimal set of {game}, or Discrete(18), "
        "the full one. Name another game with the argument game if it is not this one."
    )


def rules_of(spec: EnvSpec | None, shape: tuple[int, ...], full: bool) -> dict[str, Any]:
    """The rules of an environment and its wrappers, keyed as `games.RULES`.

    Args:
        spec: specification of the environment; None if the dataset lacks it, then few rules are known.
        shape: shape of an observation.
        full: whether actions index the full set.
    """
    kind = frame_kind(shape)
    size = shape[1:] if kind == "stack first" else shape[:2]
    seen = f"{'colour' if kind == 'colour' else 'grey'} {size[0]} x {size[1]}"
    known = {"rewards": "", "action_set": "full" if full else "minimal", "observation": seen}  # rewards: by their size
    if spec is None:
        return known
    if "AtariPreprocessing" in [wrapper.name for wrapper in spec.additional_wrappers]:
        known["observation"] += ", maximum over 2 frames"
    options, skip = spec.kwargs, spec.kwargs.get("frameskip", FRAME_SKIP)
    by_life, clipped = bool(options.get("episodic_life")), bool(options.get("reward_clipping"))
    for wrapper in spec.additional_wrappers:
        settings = wrapper.kwargs or {}
        repeat = settings.get("frame_skip", settings.get("skip", 1))
        skip = [repeat * value for value in skip] if isinstance(skip, (list, tuple)) else repeat * skip
        by_life |= bool(settings.get("terminal_on_life_loss")) or "life" in wrapper.name.lower()
        clipped |= "clipreward" in wrapper.name.lower()
    frames = options.get("max_num_frames_per_episode")
    default = "default"
    return known | {
        "rewards": "clipped" if clipped else "",
        "life_loss_terminal": by_life,
        "frame_skip": skip,
        "sticky_actions": options.get("repeat_action_probability", STICKY_ACTIONS),
        "mode": default if options.get("mode") is None else options["mode"],
        "difficulty": default if options.get("difficulty") is None else options["difficulty"],
        "max_steps": frames // skip if isinstance(frames, int) and isinstance(skip, int) else None,
    }


def convert(part: Part) -> tuple[list[dict[str, Any]], dict[str, list], Unreadable | None]:
    """Write one episode's rows and find its segments.

    Returns:
        (segments, report of excluded steps, the error of an unreadable episode or None)
    """
    content = part.content
    number, length = content["episode"], content["length"]
    writer = RowWriter(Path(part.folder), content["row"])
    indices = np.array(content["actions"])
    try:
        dataset = _keep_open(part.address.removesuffix(f" episode {number}"), content["crc32"])
        (episode,) = dataset.iterate_episodes([number])
        _check(episode, length, dataset.observation_space.shape)
        played, reward = np.asarray(episode.actions), np.asarray(episode.rewards, np.float32)
        bad = bad_steps(played, reward, np.flatnonzero(indices >= 0))
        segments = write_episode(
            writer, content["row"], to_frames(episode.observations),
            importing.map_actions(played, content["actions"]), reward, bool(episode.terminations[-1]),
            beyond=1, bad=list(bad),
        )  # fmt: skip
        writer.close()
    except ReplayError:
        raise
    except Exception as error:  # h5py's, Arrow's and Pillow's errors for damaged files
        message = f"{part.address}: cannot be read ({type(error).__name__}: {error})."
        return [], {}, Unreadable(f"{message} Download or record the dataset again.", number)
    if importing.too_many(len(bad), length):
        problem = importing.describe_invalid(part.address, part.game, len(bad), played, content["actions"])
        return [], {}, Unreadable(problem, number)
    excluded = [{"file": part.address, "row": number, "reason": f"step {step}: {bad[step]}"} for step in bad]
    return segments, {"excluded": excluded}, None


def _check(episode: Any, length: int, shape: tuple[int, ...]) -> None:
    """Check an episode's arrays against its dataset's metadata."""
    observations = episode.observations
    if observations.shape != (length + 1, *shape) or observations.dtype != np.uint8:
        raise ValueError(
            f"its observations are {observations.dtype} {list(observations.shape)}, expected uint8 "
            f"{[length + 1, *shape]}, one more than the {length} steps that its metadata promises"
        )
    for name in ("actions", "rewards", "terminations", "truncations"):
        if np.shape(getattr(episode, name)) != (length,):
            raise ValueError(f"its {name} have the shape {list(np.shape(getattr(episode, name)))}, expected [{length}]")
    if not length:
        raise ValueError("it has no steps")
    ends = np.asarray(episode.terminations, bool) | np.asarray(episode.truncations, bool)
    if ends[:-1].any():
        raise ValueError(f"it ends in step {int(np.argmax(ends))} and continues; expected one episode")


def frame_kind(shape: tuple[int, ...]) -> str | None:
    """Kind of an observation of this shape: grey, colour, stack first, stack last; None if unsupported."""
    if len(shape) == 2:
        return "grey"
    if len(shape) != 3:
        return None
    if shape[1:] == FRAME_SHAPE:
        return "stack first"
    if shape[2] == 3:
        return "colour"
    return "stack last" if shape[:2] == FRAME_SHAPE else None


def to_frames(observations: np.ndarray) -> Iterator[np.ndarray]:
    """Convert observations to frames, uint8 [n, 84, 84] at a time; see `import_minari`.

    Args:
        observations: uint8 [N, ...], of a shape supported by `frame_kind`.
    """
    kind = frame_kind(observations.shape[1:])
    for begin in range(0, len(observations), BLOCK):
        block = observations[begin : begin + BLOCK]
        if kind == "stack first":
            block = block[:, -1]
        elif kind == "stack last":
            block = block[..., -1]
        elif kind == "colour":
            block = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in block])
        if block.shape[1:] != FRAME_SHAPE:
            block = np.stack([cv2.resize(frame, FRAME_SHAPE[::-1], interpolation=cv2.INTER_AREA) for frame in block])
        yield np.ascontiguousarray(block)
