//! Stages that are killed at any point and started again: in the end there is what one undisturbed run gives, once.
//!
//! Where kills fall is random. A failure names its seed; `DOPPEL_TEST_SEED` repeats it, as far as clocks allow.

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use scenarios::binaries;
use scenarios::lakes::{self, assert_same, command, results, settled};
use scenarios::proxy::Proxy;
use scenarios::s3::{Key, S3, environment};
use scenarios::tiny::{Workplace, with};
use serde_json::{Value, json};

/// Conversations in the input: their vectors are three commits.
const CONVERSATIONS: usize = 5000;
/// Samples of one run: their vectors are two commits, and eight shards of them three commits each.
const SAMPLES: usize = 6144;
/// Kills that a stage must survive, by itself.
const KILLS: usize = 20;
/// Kills that all shards of a run must survive.
const KILLS_OF_SHARDS: usize = 50;
const SHARDS: usize = 8;
/// Longer than any stage here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Random numbers, the same from the same seed.
struct Dice(u64);

impl Dice {
    fn seed() -> u64 {
        let given = std::env::var("DOPPEL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
        given.unwrap_or_else(now)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014), in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() * count as f64) as usize
    }
}

/// Where a stage leaves traces of how far it is.
enum Watched<'a> {
    /// Files below a folder.
    Folder(&'a Path),
    /// Requests through a proxy.
    Proxy(&'a Proxy),
}

impl Watched<'_> {
    /// Counts what comes from now on.
    fn counter(&self) -> Box<dyn Fn() -> usize + '_> {
        match self {
            Watched::Folder(folder) => {
                let before: HashSet<PathBuf> = lakes::files(folder).into_iter().collect();
                Box::new(move || lakes::files(folder).iter().filter(|file| !before.contains(*file)).count())
            }
            Watched::Proxy(proxy) => {
                let before = proxy.seen();
                Box::new(move || (proxy.seen() - before) as usize)
            }
        }
    }
}

/// When to kill.
enum Point<'a> {
    /// That long after the start.
    At(Duration),
    /// A moment after that many files or requests came: in the middle of what they are about.
    After { count: usize, watched: &'a Watched<'a>, pause: Duration },
}

impl<'a> Point<'a> {
    /// A random one for a stage that takes `usual`. Later attempts get more time: no cluster kills as fast for ever.
    fn roll(dice: &mut Dice, attempt: usize, usual: Duration, watched: &'a Watched<'a>) -> Self {
        if attempt.is_multiple_of(2) {
            return Point::At(usual.mul_f64(dice.next() * (1.0 + attempt as f64 / 10.0)));
        }
        let most = match watched {
            Watched::Folder(_) => 5,
            Watched::Proxy(_) => 60 + 2 * attempt,
        };
        Point::After { count: 1 + dice.below(most), watched, pause: Duration::from_micros(dice.below(4000) as u64) }
    }

    /// Waits for it, or for the end of `child`.
    fn wait(&self, child: &mut Child) {
        let started = Instant::now();
        let come: Box<dyn Fn() -> bool> = match self {
            Point::At(time) => Box::new(move || started.elapsed() >= *time),
            Point::After { count, watched, .. } => {
                let counter = watched.counter();
                Box::new(move || counter() >= *count)
            }
        };
        while !come() && child.try_wait().expect("a child").is_none() {
            std::thread::sleep(Duration::from_micros(500));
        }
        if let Point::After { pause, .. } = self {
            std::thread::sleep(*pause);
        }
    }
}

/// Starts `command` and kills it at `point`; `false` if it ended well before.
#[track_caller]
fn is_killed(command: &mut Command, point: &Point, how: &str) -> bool {
    let mut log = tempfile::tempfile().expect("a file");
    let log_too = log.try_clone().expect("a file");
    let mut child = command.stdout(Stdio::null()).stderr(log_too).spawn().expect("a stage starts");
    point.wait(&mut child);
    child.kill().expect("a child can be killed");
    let status = child.wait().expect("a child ends");
    if status.signal() == Some(9) {
        return true;
    }
    assert!(status.success(), "{how}: {status}\n{}", read(&mut log));
    false
}

fn read(file: &mut std::fs::File) -> String {
    use std::io::{Read, Seek};
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("a log is readable");
    text
}

/// Runs `command` to its end; how long it took.
#[track_caller]
fn run(command: &mut Command, how: &str) -> Duration {
    let started = Instant::now();
    assert!(!is_killed(command, &Point::At(PATIENCE), how), "{how}: it takes too long");
    started.elapsed()
}

/// One stage, and the lakes before and after its undisturbed run.
struct Scene {
    name: &'static str,
    before: PathBuf,
    after: PathBuf,
    usual: Duration,
}

/// Names of the stages in their order.
const STAGES: [&str; 6] = ["partition", "train", "synthesize", "embed", "embed-corpus", "vote"];

/// The command of the stage `name` on the lake called `lake`.
fn line(place: &Workplace, name: &str, lake: &str) -> String {
    match name {
        "partition" => with(&place.partition(lake), "--dedup=exact", "--dedup=none"),
        "train" => {
            let longer = with(&place.train(lake), "--steps=2", "--steps=6 --checkpoint-every=1");
            with(&longer, "--records=200", "--records=3000")
        }
        "synthesize" => synthesize(place, lake, "--no-adapter"),
        "embed" => place.embed(lake, "--of=synthetic"),
        "embed-corpus" => place.embed_corpus(lake),
        _ => place.vote(lake),
    }
}

fn synthesize(place: &Workplace, lake: &str, which: &str) -> String {
    let count = format!("--count={SAMPLES} --batch-size=256");
    let more = with(&place.synthesize(lake, which), "--count=60", &count);
    with(&more, "--max-new-tokens=24", "--max-new-tokens=6")
}

/// A place with enough conversations that stages take a while.
fn workplace() -> Workplace {
    let place = Workplace::new();
    let conversation = |index: usize| {
        let turn = json!({ "from": "human", "value": format!("Write poem number {index} about the sea.") });
        json!({ "id": format!("u{index:05}_0"), "conversations": [turn] })
    };
    let all: Value = (0..CONVERSATIONS).map(conversation).collect();
    std::fs::write(place.path("conversations.json"), all.to_string()).expect("conversations are written");
    place
}

/// Runs `stages` once, undisturbed, and keeps the lake before and after each of them.
fn rehearse(place: &Workplace, stages: &[&'static str]) -> Vec<Scene> {
    lakes::write_noise_key(&place.path("calm/private"));
    run(&mut command(&place.budget("calm", "50")), "budget");
    let scene = |&name: &&'static str| {
        let (before, after) = (place.path(&format!("before-{name}")), place.path(&format!("after-{name}")));
        lakes::copy(&place.path("calm"), &before);
        let usual = run(&mut command(&line(place, name, "calm")), name);
        lakes::copy(&place.path("calm"), &after);
        Scene { name, before, after, usual }
    };
    stages.iter().map(scene).collect()
}

/// Kills `command` at random points until it is done; how often.
fn kill_until_done(
    dice: &mut Dice,
    usual: Duration,
    watched: &Watched,
    how: &str,
    mut command: impl FnMut() -> Command,
) -> usize {
    let mut kills = 0;
    while is_killed(&mut command(), &Point::roll(dice, kills, usual, watched), &format!("{how}, kill {kills}")) {
        kills += 1;
    }
    kills
}

#[test]
fn a_stage_that_is_killed_again_and_again_ends_as_one_that_was_not() {
    let (place, seed) = (workplace(), Dice::seed());
    // Shards of synthesize have a test of their own.
    for scene in rehearse(&place, &STAGES).iter().filter(|scene| scene.name != "synthesize") {
        let (expected, ledger) = (results(&scene.after), settled(&scene.after));
        let (lake, mut dice, mut kills) = (format!("stormy-{}", scene.name), Dice(seed), 0);
        let folder = place.path(&lake);
        while kills < KILLS {
            lakes::copy(&scene.before, &folder);
            let how = format!("{} after {kills} kills, seed {seed}", scene.name);
            let stage = || command(&line(&place, scene.name, &lake));
            kills += kill_until_done(&mut dice, scene.usual, &Watched::Folder(&folder), &how, stage);
            assert_same(&results(&folder), &expected, &how);
            assert_eq!(settled(&folder), ledger, "{how}");
        }
    }
}

#[test]
fn training_that_is_killed_again_and_again_on_s3_ends_as_one_that_was_not() {
    let (place, seed) = (workplace(), Dice::seed());
    let server = server();
    let proxy = Proxy::start(server.address()).expect("a proxy");
    let scene = rehearse(&place, &STAGES[..2]).pop().expect("a scene");
    let (expected, ledger) = (results(&scene.after), settled(&scene.after));
    let (mut dice, mut kills, mut round) = (Dice(seed), 0, 0);
    while kills < KILLS {
        let lake = format!("s3:stormy-{round}");
        transfer(&server, &place, &scene.before, &lake, Way::Up);
        let how = format!("train after {kills} kills, seed {seed}");
        let stage = || {
            let mut command = command(&line(&place, "train", &lake));
            command.envs(environment(&proxy.endpoint(), Key::Both));
            command
        };
        kills += kill_until_done(&mut dice, scene.usual, &Watched::Proxy(&proxy), &how, stage);
        let folder = place.path(&format!("down-{round}"));
        transfer(&server, &place, &folder, &lake, Way::Down);
        assert_same(&results(&folder), &expected, &how);
        assert_eq!(settled(&folder), ledger, "{how}");
        round += 1;
    }
}

#[test]
fn eight_shards_that_are_killed_while_they_append_to_one_table_write_each_row_once() {
    let (place, seed) = (workplace(), Dice::seed());
    let server = server();
    let shard = |lake: &str, index: usize, endpoint: &str| {
        let mut command = command(&synthesize(&place, lake, &format!("--no-adapter --shard={index}/{SHARDS}")));
        command.envs(environment(endpoint, Key::Release));
        command
    };
    let all = |work: &(dyn Fn(usize) -> usize + Sync)| -> usize {
        std::thread::scope(|scope| {
            let shards: Vec<_> = (0..SHARDS).map(|index| scope.spawn(move || work(index))).collect();
            shards.into_iter().map(|shard| shard.join().expect("a shard ends well")).sum()
        })
    };
    let started = Instant::now();
    all(&|index| {
        run(&mut shard("s3:calm", index, &server.endpoint()), "an undisturbed shard");
        0
    });
    // Short of what it takes, so that few shards end before their last kill.
    let usual = started.elapsed() / 2;
    let kills = all(&|index| {
        let proxy = Proxy::start(server.address()).expect("a proxy");
        let mut dice = Dice(seed.wrapping_add(index as u64));
        let how = format!("shard {index}, seed {seed}");
        let mut kills = 0;
        // A shard that has ended starts again, and must leave everything as it is.
        while kills < KILLS_OF_SHARDS.div_ceil(SHARDS) {
            let stage = || shard("s3:stormy", index, &proxy.endpoint());
            kills += kill_until_done(&mut dice, usual, &Watched::Proxy(&proxy), &how, stage);
        }
        kills
    });
    assert!(kills >= KILLS_OF_SHARDS, "{kills} kills");
    let found = ["s3:calm", "s3:stormy"].map(|lake| {
        let folder = place.path(&lake.replace(':', "-"));
        transfer(&server, &place, &folder, lake, Way::Down);
        results(&folder)
    });
    assert_same(&found[1], &found[0], &format!("{kills} kills, seed {seed}"));
    let rows = &found[0]["release/runs/tiny/synthetic"];
    let ids: HashSet<&str> = rows.iter().filter_map(|row| row.split(" | ").next()).collect();
    assert_eq!((rows.len(), ids.len()), (SAMPLES, SAMPLES));
}

#[test]
fn a_second_copy_of_a_running_stage_doubles_nothing() {
    let (place, seed) = (workplace(), Dice::seed());
    let mut dice = Dice(seed);
    for scene in rehearse(&place, &STAGES) {
        let (expected, ledger) = (results(&scene.after), settled(&scene.after));
        let lake = format!("twice-{}", scene.name);
        // At once, and while the first is at work.
        for share in [0.0, 0.3 + 0.6 * dice.next()] {
            lakes::copy(&scene.before, &place.path(&lake));
            let how = format!("{}, a second copy after {share:.2} of its time, seed {seed}", scene.name);
            let start = || {
                let mut command = command(&line(&place, scene.name, &lake));
                command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a stage starts")
            };
            let first = start();
            std::thread::sleep(scene.usual.mul_f64(share));
            let ended = [start(), first].map(|copy| copy.wait_with_output().expect("a stage ends"));
            for copy in &ended {
                let log = String::from_utf8_lossy(&copy.stderr);
                let told = copy.status.code().is_some_and(|code| code > 1) && log.contains("help:");
                assert!(copy.status.success() || told, "{how}: {}\n{log}", copy.status);
            }
            // Where one gave way to the other, the other may be at fault too; the next attempt tells.
            run(&mut command(&line(&place, scene.name, &lake)), &how);
            assert!(ended.iter().any(|copy| copy.status.success()), "{how}: both gave way");
            assert_same(&results(&place.path(&lake)), &expected, &how);
            assert_eq!(settled(&place.path(&lake)), ledger, "{how}");
        }
    }
}

fn server() -> S3 {
    S3::start().unwrap_or_else(|error| panic!("{error}"))
}

/// Between this machine and the S3 server.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

/// Copies a lake between `folder` and the S3 server, in a process of its own, since credentials come from the
/// environment.
#[track_caller]
fn transfer(server: &S3, place: &Workplace, folder: &Path, lake: &str, way: Way) {
    for (url, zone) in [(place.private(lake), "private"), (place.release(lake), "release")] {
        let folder = folder.join(zone).display().to_string();
        let (from, to) = match way {
            Way::Up => (folder, url),
            Way::Down => (url, folder),
        };
        let mut child = Command::new(std::env::current_exe().expect("the test knows itself"));
        child.args(["--exact", "child_transfer", "--ignored", "--nocapture"]);
        child.envs(server.environment(Key::Both)).env("TEST_FROM", from).env("TEST_TO", to);
        assert!(binaries::run(&mut child, 0).stdout.contains("1 passed"));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by tests that look at a lake on S3"]
async fn child_transfer() {
    let variable = |name| std::env::var(name).expect("set by the test that starts this one");
    lakes::transfer(&variable("TEST_FROM"), &variable("TEST_TO")).await;
}
