use proptest::prelude::*;

use super::*;

fn plan(clusters: usize) -> Plan {
    Plan { clusters, iterations: 20, restarts: 3, subsample: None, seed: 5 }
}

/// `groups` groups of `each` rows around far-apart corners.
fn groups(groups: usize, each: usize, columns: usize) -> Matrix {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut rows = Matrix::new(columns);
    for index in 0..groups * each {
        let corner = index % groups;
        let row: Vec<f32> = (0..columns)
            .map(|column| {
                let centre = if (corner >> (column % 8)) & 1 == 1 { 10.0 } else { -10.0 };
                centre + unit_interval(&mut random) as f32
            })
            .collect();
        rows.extend(&row);
    }
    rows
}

fn nearest_by_hand(row: &[f32], centroids: &Matrix) -> f64 {
    let distance = |bin: usize| -> f64 {
        row.iter().zip(centroids.row(bin)).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum()
    };
    (0..centroids.rows()).map(distance).fold(f64::INFINITY, f64::min)
}

#[test]
fn separate_groups_are_found() {
    let data = groups(20, 50, 17);
    let clustering = fit(&data, &plan(20));
    let counts = assign(&data, &clustering.centroids).counts(20);
    assert_eq!(counts, vec![50; 20]);
    assert!(clustering.inertia / 1000.0 < 17.0 / 12.0 * 1.1, "{}", clustering.inertia);
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let data = groups(30, 40, 12);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| fit(&data, &plan(23)))
    };
    assert_eq!(with(1), with(4));
}

#[test]
fn as_many_clusters_as_rows_leave_none_empty() {
    let data = groups(8, 5, 9);
    let clustering = fit(&data, &plan(40));
    assert!(clustering.inertia < 1e-6, "{}", clustering.inertia);
}

#[test]
fn equal_rows_do_not_stall_it() {
    let data = Matrix::from_values(2, [1.0, 2.0].repeat(50)).expect("whole rows");
    let clustering = fit(&data, &plan(4));
    assert_eq!(clustering.inertia, 0.0);
    assert!(clustering.centroids.values().iter().all(|value| value.is_finite()));
}

#[test]
fn an_empty_cluster_takes_the_farthest_row() {
    let mut assignment = Assignment { bins: vec![0, 0, 0, 2], squared_distances: vec![1.0, 5.0, 2.0, 9.0] };
    fill_empty(&mut assignment, 3);
    // Row 3 is farthest but alone in its cluster.
    assert_eq!(assignment.bins, [0, 1, 0, 2]);
}

#[test]
fn more_iterations_do_not_make_it_worse() {
    let data = groups(100, 10, 6);
    let inertia = |iterations| fit(&data, &Plan { iterations, restarts: 1, ..plan(31) }).inertia;
    let mut last = f64::INFINITY;
    for iterations in [1, 2, 5, 20] {
        let now = inertia(iterations);
        assert!(now <= last * 1.001, "{iterations}: {now} after {last}");
        last = now;
    }
}

#[test]
fn a_subsample_finds_nearly_the_same() {
    let data = groups(16, 400, 8);
    let all = fit(&data, &plan(16));
    let part = fit(&data, &Plan { subsample: Some(1000), ..plan(16) });
    let inertia = assign(&data, &part.centroids).inertia();
    assert!(inertia < all.inertia * 1.02, "{inertia} against {}", all.inertia);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_nearest_centroid_is_nearest(
        rows in prop::collection::vec(-1.0_f32..1.0, 7 * 30),
        centroids in prop::collection::vec(-1.0_f32..1.0, 7 * 37),
    ) {
        let data = Matrix::from_values(7, rows).expect("whole rows");
        let centroids = Matrix::from_values(7, centroids).expect("whole rows");
        let assignment = assign(&data, &centroids);
        for row in 0..data.rows() {
            let expected = nearest_by_hand(data.row(row), &centroids);
            prop_assert!((f64::from(assignment.squared_distances[row]) - expected).abs() < 1e-4);
        }
    }
}
