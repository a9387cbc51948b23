//! Line charts as .svg or .png.

use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use stage::Failure;

/// A chart of lines over common axes.
pub struct Chart {
    /// Title.
    pub title: String,
    /// What the x axis shows.
    pub x: String,
    /// What the y axis shows.
    pub y: String,
    /// Lines with their names.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

const SIZE: (u32, u32) = (900, 560);

/// Writes `chart` to `file`, whose name ends in .svg or .png.
pub fn write(file: &Path, chart: &Chart) -> Result<(), Failure> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // The font is a constant of a dependency; a chart without it fails below with a message.
        let _ = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
    });
    let format = file.extension().and_then(|extension| extension.to_str());
    if !matches!(format, Some("svg" | "png")) {
        return Err(Failure::Usage(format!("{}: a plot's file name ends in .svg or .png", file.display())));
    }
    let failed = |error: &dyn std::fmt::Display| {
        let help = "name a file that can be written, in a folder that exists";
        Failure::Usage(format!("{}: cannot be written: {error}\nhelp: {help}", file.display()))
    };
    // Errors of the backends wrap the system's words in their own.
    std::fs::File::create(file).map_err(|error| failed(&error))?;
    let drawn = match format {
        Some("svg") => draw(&SVGBackend::new(file, SIZE).into_drawing_area(), chart),
        _ => draw(&BitMapBackend::new(file, SIZE).into_drawing_area(), chart),
    };
    drawn.map_err(|error| failed(&error))
}

fn draw<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart) -> Result<(), String> {
    let text = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    area.fill(&WHITE).map_err(text)?;
    let points = || chart.lines.iter().flat_map(|(_, points)| points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let range = |values: Vec<f64>| {
        let (low, high) =
            values.iter().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(*value), high.max(*value)));
        if low < high { low..high } else { 0.0..high.max(1.0) }
    };
    let xs = range(points().map(|point| point.0).collect());
    let ys = range(points().map(|point| point.1).chain([0.0]).collect());
    let ys = ys.start..ys.end * 1.05;
    let mut context = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(xs, ys)
        .map_err(text)?;
    context.configure_mesh().x_desc(&chart.x).y_desc(&chart.y).light_line_style(TRANSPARENT).draw().map_err(text)?;
    for (i, (name, points)) in chart.lines.iter().enumerate() {
        let colour = Palette99::pick(i).stroke_width(2);
        let finite = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
        let series = context.draw_series(LineSeries::new(finite, colour)).map_err(text)?;
        series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
    }
    let mut labels = context.configure_series_labels();
    labels.background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.3)).draw().map_err(text)?;
    area.present().map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_are_written_in_both_formats() {
        let folder = tempfile::tempdir().unwrap();
        let lines = vec![("a".to_owned(), vec![(0.0, 0.0), (1.0, 2.0)]), ("empty".to_owned(), Vec::new())];
        let chart = Chart { title: "ε".into(), x: "x".into(), y: "y".into(), lines };
        for (name, start) in [("c.svg", &b"<svg"[..]), ("c.png", &b"\x89PNG"[..])] {
            let file = folder.path().join(name);
            write(&file, &chart).unwrap();
            assert!(std::fs::read(&file).unwrap().starts_with(start), "{name}");
        }
        assert_eq!(write(&folder.path().join("c.pdf"), &chart).unwrap_err().exit_code(), 2);
        let told = write(&folder.path().join("no/such/c.svg"), &chart).unwrap_err();
        assert_eq!(told.exit_code(), 2);
        for part in ["no/such/c.svg: cannot be written: No such file", "help: name a file"] {
            assert!(told.to_string().contains(part) && !told.to_string().contains("backend"), "{told}");
        }
    }
}
