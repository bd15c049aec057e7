//! The restorer's root: entry point and the order of the last steps. A plain, empty program unless
//! built as a blob.
//!
//! # Safety
//! The engine jumps here with the arena of [`restorer::args`] prepared and every signal blocked. From
//! then on nothing of the engine's address space may be touched but the hole.
#![cfg_attr(blob, no_std)]
#![cfg_attr(blob, no_main)]

#[cfg(blob)]
mod creds;
#[cfg(blob)]
mod fail;
#[cfg(blob)]
mod label;
#[cfg(blob)]
mod leave;
#[cfg(blob)]
mod memory;
#[cfg(blob)]
mod process;
#[cfg(blob)]
mod seccomp;
#[cfg(blob)]
mod settings;
#[cfg(blob)]
mod signals;
#[cfg(blob)]
mod threads;
#[cfg(blob)]
mod timers;

#[cfg(blob)]
mod image {
    use restorer::{BUILD, Shared, Stage, TaskArgs, ThreadArgs, report::Call, report::Object};

    use crate::{
        creds,
        fail::{Failed, end, fail},
        label::{self, Label},
        leave, memory, process, seccomp, settings, signals, threads, timers,
    };

    blobrt::entry!(restorer_entry, run, "ud2");

    /// What every thread of the task works with.
    pub struct Task {
        /// Head of the arena.
        pub args: &'static TaskArgs,
        /// The area shared with the engine and all other tasks.
        pub shared: &'static Shared,
    }

    /// The leader, alone at first.
    ///
    /// # Safety
    /// `args` heads the arena the engine prepared; nobody else runs in this address space.
    unsafe extern "C" fn run(args: *const TaskArgs) {
        // SAFETY: the engine passes the arena, which lives in the hole to the end.
        let task = unsafe { Task { args: &*args, shared: &*((*args).shared as *const Shared) } };
        let Some(leader) = task.threads().first() else { end() };
        if let Err(failed) = alone(&task, leader) {
            fail(&task, leader.tid, failed)
        }
        // SAFETY: args and leader are in the arena.
        unsafe { thread(args, leader) }
    }

    /// What has to happen while the task has one thread.
    fn alone(task: &Task, leader: &ThreadArgs) -> Result<(), Failed> {
        if task.args.build != BUILD || task.shared.build != BUILD {
            return Err(Failed::new(Call::Build, Object::Build, 0, BUILD, task.args.build));
        }
        signals::block_all()?;
        memory::forget_engine_thread()?;
        memory::park_vdso(task)?;
        memory::drop_engine(task)?;
        memory::place(task)?;
        memory::place_vdso(task)?;
        // Nothing may touch this memory before: a page that is there is not asked for any more.
        memory::hand_over(task)?;
        // The engine's executable must not be mapped any more.
        memory::describe(task)?;
        process::attributes(task)?;
        threads::own_state(task, leader)?;
        label::of_process(task, leader)?;
        threads::make_others(task)
    }

    /// From here on the same for every thread.
    ///
    /// # Safety
    /// `args` heads the arena, `me` is one of its threads and the one that runs.
    pub unsafe extern "C" fn thread(args: *const TaskArgs, me: *const ThreadArgs) -> ! {
        // SAFETY: as the caller says; the arena lives to the end.
        let (task, me) =
            unsafe { (Task { args: &*args, shared: &*((*args).shared as *const Shared) }, &*me) };
        if let Err(failed) = together(&task, me) {
            fail(&task, me.tid, failed)
        }
        if me.tiles != 0 {
            // SAFETY: the engine has seen that the processor has tiles; the leader has asked for them.
            unsafe { leave::take_tiles() }
        }
        // SAFETY: the frame was built by the engine for this thread.
        unsafe { leave::sigreturn(me.frame) }
    }

    /// Stage by stage, all tasks in step.
    fn together(task: &Task, me: &ThreadArgs) -> Result<(), Failed> {
        let leader = me.tid == task.args.pid;
        pass(task, Stage::Restore, Stage::RestoreSigchld);
        // Children that were to die have done so by now; their SIGCHLD must not be seen.
        if leader {
            process::close(task)?;
            process::late(task)?;
            signals::actions(task)?;
            // All threads are there, so timers may name them.
            timers::posix(task)?;
            timers::intervals(task)?;
            signals::queue_for_process(task)?;
        }
        signals::queue_for_thread(task, me)?;
        pass(task, Stage::RestoreSigchld, Stage::RestoreCreds);
        // Limits may leave no room for one more descriptor.
        let label = Label::open(task, me)?;
        // The engine has attached to every thread and suspended seccomp. Filters need the rights that
        // the credentials below may take away.
        settings::apply(task, me.settings)?;
        threads::schedule(me)?;
        if leader {
            label::all_open(task)?;
            process::limits(task)?;
        }
        seccomp::restore(task, me)?;
        creds::restore(task, me, label)?;
        // Changing credentials resets both.
        process::dumpable(task)?;
        threads::parent_death_signal(me)?;
        if leader {
            // What forbids things from now on: nothing may be left to do that it forbids.
            settings::apply(task, task.args.last)?;
        }
        pass(task, Stage::RestoreCreds, Stage::Complete);
        if leader {
            label::close(task);
        }
        Ok(())
    }

    /// Reports the end of `done` and waits for `next`.
    fn pass(task: &Task, done: Stage, next: Stage) {
        task.shared.reach(done);
        if !task.shared.await_open(next) {
            end()
        }
    }

    impl Task {
        /// All threads, the leader first.
        pub fn threads(&self) -> &'static [ThreadArgs] {
            self.table(self.args.threads)
        }

        /// A table of the arena.
        pub fn table<T>(&self, table: restorer::args::Table<T>) -> &'static [T] {
            // SAFETY: the engine laid out every table of the arguments inside this arena, and nobody
            // writes to the arena any more.
            unsafe { table.get(self.args) }
        }

        /// One row of a table; an index outside is a mistake of the engine, reported as such.
        pub fn row<T>(&self, table: restorer::args::Table<T>, at: u32) -> Result<&'static T, Failed> {
            self.table(table).get(at as usize).ok_or(Failed::new(
                Call::Build,
                Object::Build,
                0,
                u64::from(at),
                table.count,
            ))
        }
    }
}

#[cfg(not(blob))]
fn main() {}
