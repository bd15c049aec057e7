//! The processor a tree was dumped on (`cpuinfo.img`), and whether this one will do: `--cpu-cap`, `cpuinfo dump` and
//! `cpuinfo check`.
//!
//! Programs and libraries choose instructions when they start; restored where these are missing they end by SIGILL. The
//! image has what CPUID told ([`arch::features`](crate::arch)), and the option says what is compared:
//!
//! ```text
//! fpu   extended states: all that there were, areas of the same size
//! ins   instructions: all that there were
//! cpu   every word equal
//! ```

use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    arch::{Features, INSTRUCTIONS, STATES, Vendor, WORDS, WORDS_OF_FIRST},
    error::{Error, Result},
    options::CpuCap,
};

/// Version of the words.
const VERSION: u32 = 2;

/// Writes the image. World: Dump.
///
/// # Errors
/// A processor that the image has no number for; what keeps the file from being written.
pub fn dump(images: &ImageDir) -> Result<()> {
    let entry = pb::CpuinfoEntry { x86_entry: vec![entry(&Features::host())?], ..Default::default() };
    let mut out = images.writer(ImageKind::Cpuinfo, 0);
    out.write(&entry)?;
    Ok(out.finish()?)
}

/// Compares the image with this processor. World: Plan.
///
/// # Errors
/// What this processor lacks, by name; an image that is missing, of another architecture, or not understood.
pub fn check(images: &ImageDir, cap: CpuCap) -> Result<()> {
    let found: Option<pb::CpuinfoEntry> = images.read_opt(ImageKind::Cpuinfo, 0)?;
    let found = found.ok_or_else(|| {
        Error::image("cpuinfo.img: there is no such image")
            .remedy("dump with --cpu-cap, or leave the option out")
    })?;
    let [then] = found.x86_entry.as_slice() else {
        return Err(Error::image("cpuinfo.img is not that of one x86 processor"));
    };
    compare(then, &Features::host(), cap)
}

fn entry(host: &Features) -> Result<pb::CpuinfoX86Entry> {
    use pb::cpuinfo_x86_entry::Vendor as Number;
    let vendor = match host.vendor {
        Some(Vendor::Intel) => Number::Intel,
        Some(Vendor::Amd) => Number::Amd,
        None => {
            return Err(Error::unsupported("images know processors of Intel and AMD only")
                .remedy("dump without --cpu-cap"));
        }
    };
    Ok(pb::CpuinfoX86Entry {
        vendor_id: vendor.into(),
        cpu_family: host.family,
        model: host.model,
        stepping: host.stepping,
        capability_ver: VERSION,
        capability: host.words.to_vec(),
        model_id: Some(host.name.clone()).filter(|name| !name.is_empty()),
        xfeatures_mask: Some(host.components),
        xsave_size: Some(host.area),
        xsave_size_max: Some(host.largest_area),
    })
}

fn compare(then: &pb::CpuinfoX86Entry, host: &Features, cap: CpuCap) -> Result<()> {
    let expected = match then.capability_ver {
        1 => WORDS_OF_FIRST,
        VERSION => WORDS,
        other => return Err(Error::image(format!("cpuinfo.img: words of an unknown version {other}"))),
    };
    if then.capability.len() != expected {
        let found = then.capability.len();
        return Err(Error::image(format!("cpuinfo.img has {found} words instead of {expected}")));
    }
    // What an older image does not tell is as it is here.
    let mut words = host.words;
    words.iter_mut().zip(&then.capability).for_each(|(word, told)| *word = *told);
    let lacks = |word: usize, bit: u32| words[word] & !host.words[word] & 1 << bit != 0;
    let of = then.model_id.as_deref().unwrap_or("another processor").trim_end();
    let differs = |what: String| {
        Error::host(format!("the images are of {of}, this is {}: {what}", host.name.trim_end()))
            .remedy("restore on a machine like that, or compare less with --cpu-cap")
    };
    if cap.contains(CpuCap::FPU) {
        let missing: Vec<&str> =
            STATES.iter().filter(|(word, bit, _)| lacks(*word, *bit)).map(|(.., name)| *name).collect();
        if !missing.is_empty() {
            return Err(differs(format!("without {}", missing.join(", "))));
        }
        let missing = then.xfeatures_mask.unwrap_or(0) & !host.components;
        if missing != 0 {
            return Err(differs(format!("without extended states {missing:#x} (XSAVE components)")));
        }
        for (what, told, here) in [
            ("those that are on", then.xsave_size, host.area),
            ("all", then.xsave_size_max, host.largest_area),
        ] {
            if told.is_some_and(|told| told != here) {
                let told = told.unwrap_or_default();
                return Err(differs(format!("an XSAVE area of {what} has {here} bytes, not {told}")));
            }
        }
    }
    if cap.contains(CpuCap::INS) {
        let all = INSTRUCTIONS.iter().flat_map(|(word, bits)| bits.iter().map(move |bit| (*word, bit)));
        let missing: Vec<&str> =
            all.filter(|(word, (bit, _))| lacks(*word, *bit)).map(|(_, (_, name))| *name).collect();
        if !missing.is_empty() {
            return Err(differs(format!("without {}", missing.join(", "))));
        }
    }
    if cap.contains(CpuCap::CPU)
        && let Some(word) = words.iter().zip(&host.words).position(|(then, here)| then != here)
    {
        let bits = words[word] ^ host.words[word];
        return Err(differs(format!("word {word} of the features differs in bits {bits:#x}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(result: Result<()>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn the_processor_the_image_was_made_on_will_do() {
        let folder = tempfile::tempdir().unwrap();
        let images = ImageDir::open(folder.path()).unwrap();
        assert!(said(check(&images, CpuCap::ALL)).contains("no such image"));
        dump(&images).unwrap();
        check(&images, CpuCap::all()).unwrap();
    }

    #[test]
    fn what_is_missing_is_named_as_far_as_it_is_asked_for() {
        let mut host = Features::host();
        host.vendor = Some(Vendor::Intel);
        let then = entry(&host).unwrap();
        // AVX2, and the largest area.
        let mut less = host.clone();
        less.words[9] &= !(1 << 5);
        let (none, all) = (CpuCap::empty(), CpuCap::ALL);
        if less != host {
            assert!(said(compare(&then, &less, CpuCap::INS)).contains("without avx2"));
            assert!(said(compare(&then, &less, CpuCap::CPU)).contains("word 9"));
        }
        compare(&then, &less, CpuCap::FPU).unwrap();
        compare(&then, &less, none).unwrap();
        // More here than there was is no harm, but for who wants the same.
        let before = entry(&less).unwrap();
        compare(&before, &host, CpuCap::INS | CpuCap::FPU).unwrap();
        let mut wide = host.clone();
        wide.largest_area += 64;
        assert!(said(compare(&then, &wide, CpuCap::FPU)).contains("XSAVE area of all"));
        let mut narrow = host.clone();
        narrow.components &= !1;
        assert!(said(compare(&then, &narrow, all)).contains("extended states 0x1"));
    }

    #[test]
    fn images_that_are_not_understood_are_errors() {
        let host = Features::host();
        let words = |version, count| pb::CpuinfoX86Entry {
            capability_ver: version,
            capability: vec![0; count],
            ..Default::default()
        };
        compare(&words(1, WORDS_OF_FIRST), &host, CpuCap::INS).unwrap();
        assert!(said(compare(&words(3, WORDS), &host, CpuCap::INS)).contains("unknown version 3"));
        assert!(said(compare(&words(2, 4), &host, CpuCap::INS)).contains("4 words instead of 19"));
    }
}
