"""Where the public data sets lie: files, sizes, checksums, and the steps for what its authors hand out on request."""

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set. path: below the base address. checksum: (algorithm, hex) or None where none is
    published.
    """

    path: str
    split: str  # train, val, test, or the name of an extra
    checksum: tuple[str, str] | None = None
    size: int | None = None  # bytes, None where the server must tell
    unpacked: int = 0  # bytes after unpacking; 0: not an archive
    query: str = ""
    base: str | None = None  # instead of the set's base address
    estimate: int = 0  # bytes, for the disk check where `size` is not known
    other: str | None = None  # SHA-256 of the file of this name in another release, which is not this one

    @property
    def name(self) -> str:
        """File name on disk."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ManualFile:
    """A file that the user fetches. parts: (name, md5) that are joined into `name` first."""

    name: str
    md5: str | None = None
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RemoteSet:
    """A data set."""

    name: str
    base: str
    files: tuple[RemoteFile, ...]
    manual: tuple[ManualFile, ...] = ()
    steps: tuple[str, ...] = ()  # what the user must do by hand
    layout: tuple[str, ...] = ()  # patterns below its folder, any of which shows that the manual part is there


COCO = RemoteSet(
    "coco",
    "http://images.cocodataset.org/",
    tuple(
        RemoteFile(path, split, ("sha256", digest), size, unpacked)
        for path, split, size, unpacked, digest in (
            (
                "annotations/annotations_trainval2017.zip",
                "always",
                252_907_541,
                820_000_000,
                "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            ),
            (
                "zips/val2017.zip",
                "val",
                815_585_330,
                820_000_000,
                "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            ),
            (
                "zips/train2017.zip",
                "train",
                19_336_861_798,
                19_400_000_000,
                "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            ),
            (
                "zips/test2017.zip",
                "test2017",
                6_646_970_404,
                6_700_000_000,
                "c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba",
            ),
        )  # fmt: skip
    )
    + (
        RemoteFile(
            "caption_datasets.zip",
            "karpathy",
            ("sha256", "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"),
            36_745_453,
            260_000_000,
            base="https://cs.stanford.edu/people/karpathy/deepimagesent/",
        ),
    ),
)

CLOTHO = RemoteSet(
    "clotho",
    "https://zenodo.org/record/4783391/files/",
    tuple(
        RemoteFile(f"clotho_{table}_{name}.csv", split, ("md5", md5), query="?download=1", estimate=2_000_000)
        for table, name, split, md5 in (
            ("captions", "development", "train", "d4090b39ce9f2491908eebf4d5b09bae"),
            ("captions", "validation", "val", "5879e023032b22a2c930aaa0528bead4"),
            ("captions", "evaluation", "test", "1b16b9e57cf7bdb7f13a13802aeb57e2"),
            ("metadata", "development", "train", "170d20935ecfdf161ce1bb154118cda5"),
            ("metadata", "validation", "val", "2e010427c56b1ce6008b0f03f41048ce"),
            ("metadata", "evaluation", "test", "13946f054d4e1bf48079813aac61bf77"),
        )
    )
    + tuple(
        RemoteFile(
            f"clotho_audio_{name}.7z", split, ("md5", md5), unpacked=unpacked, query="?download=1", estimate=estimate
        )
        for name, split, md5, unpacked, estimate in (
            ("development", "train", "c8b05bc7acdb13895bb3c6a29608667e", int(7.1 * GB), int(4.2 * GB)),
            ("validation", "val", "7dba730be08bada48bd15dc4e668df59", 2 * GB, int(1.15 * GB)),
            ("evaluation", "test", "4569624ccadf96223f19cb59fe4f849f", 2 * GB, int(1.15 * GB)),
        )
    ),
)

AUDIOCAPS_STEPS = (
    "The sounds of AudioCaps are not public files; its authors hand them out for academic use:",
    "1. Ask for them at https://forms.gle/2wF54Y1Ft2LtPdhW8",
    "2. Lay the clips into audio/train/, audio/val/ and audio/test/ of the data set's folder, named by the video and "
    "the start (ID_30, ID_30_40, Y-ID_30.000_40.000, ...), by ID or YID, or by audiocap_id; .wav, .flac, .mp3, .m4a, "
    ".ogg and .opus are read.",
    "3. Run this command again; clips that are not there are left out of training, and their number is reported.",
)
_PLACES = ("audio", "wavs", "waveforms", "clips")
AUDIOCAPS_LAYOUT = tuple(
    f"{place}/*.*" for top in _PLACES for place in (top, *(f"{top}/{split}" for split in ("train", "val", "test")))
) + ("train/*.*", "val/*.*", "test/*.*")
AUDIOCAPS = RemoteSet(
    "audiocaps",
    "https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset/",
    tuple(
        RemoteFile(f"{split}.csv", split, ("sha256", digest), size)
        for split, size, digest in (
            ("train", 3_576_723, "c0c5223db682b3bf724ce7e7ce58d5b36929f74572e8526a7211f92d2eef7c8e"),
            ("val", 171_918, "dab1c96641d5f3053ddb99dca3949450da9a75737bda53e11cc0aa8b102be0c3"),
            ("test", 402_246, "b91c4b7ded2f4f6e7db5b9c4983dc1e1dca3d556f505b61e3fd65cac7e1c638a"),
        )
    ),
    steps=AUDIOCAPS_STEPS,
    layout=AUDIOCAPS_LAYOUT,
)
AUDIOCAPS_2 = RemoteSet(
    "audiocaps",
    "https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset2.0/",
    tuple(
        RemoteFile(file.path, file.split, estimate=8_000_000, other=file.checksum and file.checksum[1])
        for file in AUDIOCAPS.files
    ),
    steps=AUDIOCAPS_STEPS,
    layout=AUDIOCAPS_LAYOUT,
)

_VOX1_PARTS = (
    "e395d020928bc15670b570a21695ed96",
    "bbfaaccefab65d82b21903e81a8a8020",
    "017d579a2a96a077f40042ec33e51512",
    "7bb1e9f70fddc7a678fa998ea8b3ba19",
)
_VOX2_PARTS = (
    "da070494c573e5c0564b1d11c3b20577",
    "17fe6dab2b32b48abaf1676429cdd06f",
    "1de58e086c5edf63625af1cb6d831528",
    "5a043eb03e15c5a918ee6a52aad477f9",
    "cea401b624983e2d0b2a87fb5d59aa60",
    "fc886d9ba90ab88e7880ee98effd6ae9",
    "d160ecc3f6ee3eed54d55349531cb42e",
    "6b84a81b9af72a9d9eecbb3b1f602e65",
)
VOXCELEB = RemoteSet(
    "voxceleb",
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/",
    (
        RemoteFile(
            "iden_split.txt",
            "always",
            ("sha256", "3c1d792d4058861cd476a27cc942c824f7e9df812864115a7c2b12df97edfbbf"),
            4_912_512,
        ),
    ),
    manual=(
        ManualFile(
            "vox1_dev_wav.zip",
            "ae63e55b951748cc486645f532ba230b",
            tuple((f"vox1_dev_wav_parta{letter}", md5) for letter, md5 in zip("abcd", _VOX1_PARTS, strict=True)),
        ),
        ManualFile("vox1_test_wav.zip", "185fdc63c3c739954633d50379a3d102"),
        ManualFile(
            "vox2_dev_aac.zip",
            "bbc063c46078a602ca71605645c2a402",
            tuple((f"vox2_dev_aac_parta{letter}", md5) for letter, md5 in zip("abcdefgh", _VOX2_PARTS, strict=True)),
        ),
        ManualFile("vox2_test_aac.zip", "0d2b3ea430a821c33263b5ea37ede312"),
    ),
    steps=(
        "VoxCeleb is handed out on request (an institutional mail address is needed):",
        "1. Ask for it at https://mm.kaist.ac.kr/datasets/voxceleb/",
        "2. Lay the files (vox1_dev_wav_partaa ... partad, vox1_test_wav.zip, vox2_dev_aac_partaa ... partah, "
        "vox2_test_aac.zip; mp4 for frames) into the data set's folder.",
        "3. Run this command again: it checks, joins and unpacks each of them. An unpacked wav/ID/VIDEO/N.wav or "
        "dev/aac/ID/VIDEO/N.m4a is accepted as it is.",
    ),
    layout=("wav/id*/*/*.wav", "dev/aac/id*/*/*.m4a", "aac/id*/*/*.m4a"),
)

GLOVE = RemoteSet(
    "glove",
    "https://nlp.stanford.edu/data/",
    (RemoteFile("glove.6B.zip", "always", unpacked=int(2.2 * GB), estimate=862_000_000),),
)

SETS = {found.name: found for found in (COCO, CLOTHO, AUDIOCAPS, VOXCELEB, GLOVE)}
