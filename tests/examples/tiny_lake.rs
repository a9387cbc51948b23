//! Writes a lake by the real stages on tiny models: `tiny_lake FOLDER` leaves FOLDER/private and FOLDER/release, for
//! readers that are not ours (infra/check_tables.py).

use scenarios::binaries;
use scenarios::tiny::Workplace;

fn main() {
    let folder = std::env::args().nth(1).expect("usage: tiny_lake FOLDER");
    let lake = std::path::absolute(folder).expect("a path").display().to_string();
    let place = Workplace::new();
    binaries::run(&mut place.run(&place.pipeline(&lake, "50")), 0);
}
